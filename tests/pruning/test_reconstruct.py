"""Reconstructed students against least squares on the tokens of transformers' models in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compactlm_nemo.models.build import ParameterSource, build_model, fill
from compactlm_nemo.models.checkpoint import CheckpointSource, save_model
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.pruning.block_replacement import (
    BlockReplacement,
    measure_replacements,
    removed_blocks,
    replacement_weight,
)
from compactlm_nemo.pruning.cut import CutSource, NarrowedSource
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.pruning.reconstruct import RefittedWriters
from compactlm_nemo.pruning.residual_stream import (
    HiddenCut,
    NormedStream,
    RefittedSelection,
    RotatedStream,
    Selection,
    stream_rotation,
)
from tests.pruning.test_cut import (
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    MLP,
    NEURONS,
    SHARED,
    expert_plan,
    plan_of,
    sliced_experts,
    student_of,
    unmerged,
)
from tests.pruning.test_least_squares import fitted
from tests.support.meshes import COMBINED, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny, tiny_model, tokens

RIDGE = 1e-3


def calibration() -> Tensor:
    return torch.randint(0, VOCAB, (5, 24), generator=torch.Generator().manual_seed(3))


def activations(model: Any) -> dict[str, numpy.ndarray]:
    """`[tokens, E]` float64 under the names of second moments; `r.{i}` and `h.{i}` are for replaced blocks."""
    seen: dict[str, Tensor] = {}
    put = seen.__setitem__
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: put(f"layers.{i}.heads", args[0]))
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: put(f"layers.{i}.mlp", args[0]))
        if not hasattr(layer, "input_layernorm"):
            continue  # its norms stand behind attention and MLP
        layer.input_layernorm.register_forward_hook(
            lambda _, args, out, i=i: (put(f"h.{i}", args[0]), put(f"layers.{i}.attention_norm", out))[0]
        )
        layer.post_attention_layernorm.register_forward_hook(
            lambda _, args, out, i=i: (put(f"r.{i}", args[0]), put(f"layers.{i}.mlp_norm", out))[0]
        )
    model.model.norm.register_forward_hook(
        lambda _, args, out: (put(f"h.{len(model.model.layers)}", args[0]), put("final_norm", out))[0]
    )
    with torch.no_grad():
        model.double()(calibration())
    return {name: x.flatten(0, 1).numpy() for name, x in seen.items()}


def moments(seen: dict[str, numpy.ndarray]) -> Any:
    return lambda name: torch.from_numpy(seen[name].T @ seen[name]).float()


def num_tokens() -> int:
    return calibration().numel()


def student_source(
    dims: Dims, source: ParameterSource, seen: dict[str, numpy.ndarray], hidden: list[int], rotate: bool = False
) -> ParameterSource:
    """All refits on top of the cut of test_cut, as a run puts them together."""
    plan = plan_of(hidden)
    moment = moments(seen)
    stream = NormedStream(moment, num_tokens(), source, one_plus=dims.norm_1p)
    narrow: HiddenCut = RefittedSelection(plan.hidden, stream, RIDGE, is_rms=not dims.layer_norm_1p)
    if rotate:
        narrow = RotatedStream(stream_rotation(dims, plan.layers, len(plan.hidden), stream), stream, RIDGE)
    wide = CutSource(dims, plan, RefittedWriters(dims, plan, source, moment, RIDGE, {}))
    return NarrowedSource(wide, dims, plan.layers, narrow)


def naive(tensors: dict[str, Tensor], seen: dict[str, numpy.ndarray], is_rms: bool) -> dict[str, numpy.ndarray]:
    """The student's Hugging Face tensors, one rule for each name, fitted on the tokens."""
    wanted = {}

    def scale(norm: str, weight: numpy.ndarray) -> float:
        if not is_rms:
            return 1.0
        return float(numpy.sqrt(((seen[norm] / weight)[:, HIDDEN] ** 2).mean()))

    for name, tensor in tensors.items():
        full = tensor.double().numpy()
        if name == "model.embed_tokens.weight":
            wanted[name] = full[:, HIDDEN]
        elif name == "lm_head.weight":
            wanted[name] = fitted(seen["final_norm"], full, HIDDEN, RIDGE)
        elif name == "model.norm.weight":
            wanted[name] = full[HIDDEN] * scale("final_norm", full)
        elif name == "model.norm.bias":
            wanted[name] = full[HIDDEN]
        else:
            layer, part = int(name.split(".")[2]), name.split(".")[-2]
            if layer in LAYERS:
                new = name.replace(f"layers.{layer}.", f"layers.{LAYERS.index(layer)}.")
                wanted[new] = _in_layer(layer, part, name.split(".")[-1], full, seen, scale)
    return wanted


def _in_layer(layer: int, part: str, kind: str, full: numpy.ndarray, seen: Any, scale: Any) -> numpy.ndarray:
    channels = [head * HEAD_DIM + i for head in HEADS[layer] for i in range(HEAD_DIM)]
    norm = (
        f"layers.{layer}.{'mlp' if part in ('gate_proj', 'up_proj', 'post_attention_layernorm') else 'attention'}_norm"
    )
    rows = {"q_proj": channels, "gate_proj": MLP[layer], "up_proj": MLP[layer]}.get(part, slice(None))
    if part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        return fitted(seen[norm], full[rows], HIDDEN, RIDGE)
    if part == "o_proj":
        return fitted(seen[f"layers.{layer}.heads"], full, channels, RIDGE)[HIDDEN]
    if part == "down_proj":
        return fitted(seen[f"layers.{layer}.mlp"], full, MLP[layer], RIDGE)[HIDDEN]
    return full[HIDDEN] * (scale(norm, full) if kind == "weight" else 1)


@pytest.mark.proves("axes", ["hidden", "ffn", "heads"], "{case}", "refitted")
@pytest.mark.parametrize("case", ["llama", "nemotron"])
def test_every_parameter_is_least_squares_on_the_tokens(case, tmp_path):
    seen = activations(save_tiny(case, tmp_path / "teacher"))
    dims, source = open_hf(tmp_path / "teacher")
    export_hf(
        tmp_path / "teacher", tmp_path / "student", student_of(dims, HIDDEN),
        student_source(dims, source, seen, HIDDEN), torch.float32,
    )  # fmt: skip
    got = load_file(tmp_path / "student" / "model.safetensors")
    want = naive(load_file(tmp_path / "teacher" / "model.safetensors"), seen, is_rms=case == "llama")
    assert got.keys() == want.keys()
    for name, expected in want.items():
        atol = 1e-4 * numpy.abs(expected).max()
        numpy.testing.assert_allclose(got[name].double().numpy(), expected, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", ["olmo2", "glm4"])
def test_norms_behind_writers_divide_by_what_the_kept_channels_are_written(case, tmp_path):
    """By sqrt(mean over the kept / mean over all) of y^2, y what the teacher writes to a channel."""
    model = save_tiny(case, tmp_path / "teacher")
    seen = activations(model)
    dims, source = open_hf(tmp_path / "teacher")
    stream = NormedStream(moments(seen), num_tokens(), source)
    refitted = RefittedSelection(torch.tensor(HIDDEN), stream, RIDGE, is_rms=True)
    narrow = NarrowedSource(source, dims, list(range(4)), refitted)
    scales: list[float] = []
    for i, layer in enumerate(model.model.layers):
        for part, linear in (
            ("self_attention.linear_proj", layer.self_attn.o_proj),
            ("mlp.linear_fc2", layer.mlp.down_proj),
        ):
            x = seen[f"layers.{i}.{'heads' if part.startswith('self') else 'mlp'}"]
            energy = ((x @ linear.weight.detach().numpy().T) ** 2).mean(axis=0)
            scale = numpy.sqrt(energy[HIDDEN].mean() / energy.mean())
            name = f"decoder.layers.{i}.{part}.post_layernorm.weight"
            want = source(name).double().numpy()[HIDDEN] * scale
            numpy.testing.assert_allclose(narrow(name).double().numpy(), want, rtol=1e-5)
            scales.append(scale)
    assert max(scales) - min(scales) > 0.02
    assert ("decoder.layers.0.input_layernorm.weight" in parameter_shapes(dims)) == (case == "glm4")


@pytest.mark.proves("axes", "ffn", "{case}", "refitted")
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_each_expert_is_fitted_on_the_tokens_it_was_sent(case, tmp_path):
    """fc2 of every kept expert and of the shared one, each on tokens of its own; all else is the cut of test_cut."""
    save_tiny(case, tmp_path / "teacher")
    dims, source = open_hf(tmp_path / "teacher")
    plan = expert_plan(dims.shared_expert_ffn > 0)
    rng = numpy.random.default_rng(0)
    widths = {"heads": dims.num_heads * dims.head_dim, "shared_expert": dims.shared_expert_ffn}
    seen: dict[str, numpy.ndarray] = {}

    def moment(name: str) -> Tensor:
        width = widths.get(name.split(".")[2], dims.ffn_hidden_size)
        seen[name] = rng.normal(size=(70, width)) @ rng.normal(size=(width, width))
        return torch.from_numpy(seen[name].T @ seen[name])

    wide = CutSource(dims, plan, RefittedWriters(dims, plan, source, moment, RIDGE, {}))
    student = dims.with_shape(
        layers=2, hidden=len(HIDDEN), ffn=4, heads=2, groups=1, experts=2,
        shared_expert_ffn=len(SHARED) if dims.shared_expert_ffn else 0,
    )  # fmt: skip
    narrow = NarrowedSource(wide, dims, plan.layers, Selection(plan.hidden))
    export_hf(tmp_path / "teacher", tmp_path / "student", student, narrow, torch.float32)
    full, got = (unmerged(load_file(tmp_path / name / "model.safetensors")) for name in ("teacher", "student"))
    fitted_ones = 0
    for name, cut in sliced_experts(full).items():
        layer = LAYERS[int(name.split(".")[2])] if name.startswith("model.layers.") else -1
        old = name.replace(f"layers.{LAYERS.index(layer)}.", f"layers.{layer}.") if layer >= 0 else name
        if ".experts." in name and name.split(".")[-2] in ("w2", "down_proj") and name.endswith("weight"):
            place = int(name.split(".experts.")[1].split(".")[0])
            expert = sorted(EXPERTS[layer])[place]
            x = seen[f"layers.{layer}.experts.{expert}.mlp"]
            w = full[old.replace(f"experts.{place}.", f"experts.{expert}.")]
            want = fitted(x, w.double().numpy(), NEURONS[expert], RIDGE)[HIDDEN]
        elif ".shared_expert.down_proj" in name:
            x = seen[f"layers.{layer}.shared_expert.mlp"]
            want = fitted(x, full[old].double().numpy(), SHARED, RIDGE)[HIDDEN]
        elif ".o_proj.weight" in name:
            continue  # as of every family, above
        else:
            assert torch.equal(got[name], cut), name
            continue
        fitted_ones += 1
        numpy.testing.assert_allclose(got[name].double().numpy(), want, rtol=1e-3, atol=1e-4, err_msg=name)
    assert fitted_ones == 4 + 2 * (dims.shared_expert_ffn > 0)


@pytest.mark.parametrize("case", ["llama", "qwen2_tied", "nemotron"])
def test_with_nothing_removed_nothing_changes(case, tmp_path):
    seen = activations(save_tiny(case, tmp_path / "teacher"))
    dims, source = open_hf(tmp_path / "teacher")
    plan = Plan(
        layers=list(range(4)), hidden=torch.arange(48),
        heads={i: torch.arange(4) for i in range(4)}, mlp={i: torch.arange(80) for i in range(4)},
    )  # fmt: skip
    writers = RefittedWriters(dims, plan, source, moments(seen), RIDGE, {})
    same = NarrowedSource(CutSource(dims, plan, writers), dims, plan.layers, Selection(plan.hidden))
    for name in parameter_shapes(dims):
        assert torch.equal(same(name), source(name)), name


def in_subspace(model: Any, rank: int) -> Any:
    """All that is written to the stream lies in one random subspace of `rank` dimensions."""
    basis, _ = torch.linalg.qr(torch.randn(48, rank, generator=torch.Generator().manual_seed(1)))
    project = basis @ basis.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ project)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(project @ linear.weight)
    return model


def logits_of(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def test_a_stream_of_few_dimensions_is_turned_without_loss(tmp_path):
    """An untied model: the student has two thirds of the channels and the teacher's logits."""
    model = in_subspace(tiny_model("llama", rms_norm_eps=1e-12), 32)
    model.save_pretrained(tmp_path / "teacher")
    seen = activations(model)
    dims, source = open_hf(tmp_path / "teacher")
    plan = Plan(
        layers=list(range(4)), hidden=torch.arange(32),
        heads={i: torch.arange(4) for i in range(4)}, mlp={i: torch.arange(80) for i in range(4)},
    )  # fmt: skip
    stream = NormedStream(moments(seen), num_tokens(), source)
    narrow = RotatedStream(stream_rotation(dims, plan.layers, len(plan.hidden), stream), stream, 1e-9)
    student = dims.with_shape(layers=4, hidden=32, ffn=80, heads=4)
    export_hf(
        tmp_path / "teacher",
        tmp_path / "student",
        student,
        NarrowedSource(source, dims, plan.layers, narrow),
        torch.float32,
    )
    want = logits_of(tmp_path / "teacher")
    torch.testing.assert_close(logits_of(tmp_path / "student"), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_a_shared_table_stays_one_through_a_rotation(tmp_path):
    """Exact at full width where the final norm's weights differ in sign alone: every norm then sees a pure rotation."""
    model = tiny_model("llama_tied_llama3_rope")
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.where(torch.arange(48) % 3 == 0, -0.7, 0.7))
    model.save_pretrained(tmp_path / "teacher")
    seen = activations(model)
    dims, source = open_hf(tmp_path / "teacher")
    plan = Plan(layers=list(range(4)), hidden=torch.arange(48), heads={}, mlp={})
    stream = NormedStream(moments(seen), num_tokens(), source)
    narrow = RotatedStream(stream_rotation(dims, plan.layers, len(plan.hidden), stream), stream, 1e-9)
    export_hf(
        tmp_path / "teacher",
        tmp_path / "student",
        dims,
        NarrowedSource(source, dims, plan.layers, narrow),
        torch.float32,
    )
    want = logits_of(tmp_path / "teacher")
    torch.testing.assert_close(logits_of(tmp_path / "student"), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def _same_student(rank: int, world: int, layout: str, root: Path, out: Path) -> None:
    """Teacher checkpoint -> reconstructed student on this layout, read back as whole parameters."""
    mesh = mesh_of(**LAYOUTS[layout][1])
    for case, rotate in (("llama", True), ("nemotron", False)):
        dims, teacher = filled(root / case, mesh)
        seen = torch.load(root / case / "seen.pt", weights_only=False)
        save_model(out / case / "teacher", teacher)
        dist.barrier()
        student = student_of(dims, HIDDEN)
        model = build_model(student, mesh, dtype=torch.float32, vocab_multiple=8)
        source = student_source(dims, CheckpointSource(out / case / "teacher", dims), seen, HIDDEN, rotate)
        fill(model, source, vocab_multiple=8)
        save_model(out / case / "student", model)
        dist.barrier()
        if rank == 0:
            want = student_source(dims, open_hf(root / case)[1], seen, HIDDEN, rotate)
            got = CheckpointSource(out / case / "student", student)
            for name in parameter_shapes(student):
                assert torch.equal(got(name), want(name)), (case, name)
        dist.barrier()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for case in ("llama", "nemotron", "granite", "llama_mlp_bias"):
        torch.save(activations(save_tiny(case, root / case)), root / case / "seen.pt")
    return root


@pytest.mark.parametrize("layout", ["1", "tp2_pp2", "pp1_3", "tp2_sp_cp2"])
def test_every_layout_makes_the_same_student(layout, teachers, tmp_path):
    run_ranks(_same_student, LAYOUTS[layout][0], tmp_path, layout, teachers, tmp_path / "out")


def test_removed_blocks_are_those_that_have_a_layer_before_them():
    assert removed_blocks([0, 1, 2], 3) == []
    assert removed_blocks([2, 3, 6], 9) == [(4, 6), (7, 9)]


def _replacements(rank: int, world: int, layout: str, root: Path) -> None:
    mesh = mesh_of(**LAYOUTS[layout][1])
    blocks = [(1, 2), (3, 4)]  # the last one ends at the final norm
    for case in ("llama", "nemotron", "granite", "llama_mlp_bias"):
        dims, model = filled(root / case, mesh)
        seen = torch.load(root / case / "seen.pt", weights_only=False)
        found = measure_replacements(model.eval(), calibration(), blocks, micro_batch=2, progress=lambda count: None)
        assert found.keys() == {0, 2}
        for start, end in blocks:
            x, gap = seen[f"layers.{start - 1}.mlp"], seen[f"h.{end}"] - seen[f"r.{start - 1}"]
            gap = gap / 0.4 if case == "granite" else gap  # its residual multiplier
            if case == "llama_mlp_bias":
                bias = load_file(root / case / "model.safetensors")[f"model.layers.{start - 1}.mlp.down_proj.bias"]
                gap = gap - bias.double().numpy()
            weight = 1 / (seen[f"h.{end}"] ** 2).mean(axis=1, keepdims=True)
            replacement = found[start - 1]
            for got, want in ((replacement.gram_FF, (weight * x).T @ x), (replacement.target_FH, (weight * x).T @ gap)):
                assert got.dtype == torch.float64
                numpy.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5 * numpy.abs(want).max())


@pytest.mark.parametrize("layout", COMBINED)
def test_replacements_are_equal_in_every_layout(layout, teachers, tmp_path):
    run_ranks(_replacements, LAYOUTS[layout][0], tmp_path, layout, teachers)


def test_a_replacement_is_weighted_least_squares(teachers):
    seen = torch.load(teachers / "llama" / "seen.pt", weights_only=False)
    weight = open_hf(teachers / "llama")[1]("decoder.layers.0.mlp.linear_fc2.weight")
    x, gap = seen["layers.0.mlp"], seen["h.2"] - seen["r.0"]
    root = 1 / numpy.sqrt((seen["h.2"] ** 2).mean(axis=1, keepdims=True))

    replacement = BlockReplacement(*(torch.from_numpy((root * x).T @ (root * each)) for each in (x, gap)))
    kept = list(range(0, 80, 2))
    damping = numpy.sqrt(0.02 * ((root * x) ** 2).sum(axis=0).mean())
    rows = numpy.vstack([(root * x)[:, kept], damping * numpy.eye(40)])
    start = weight.double().numpy()[:, kept].T
    want = numpy.linalg.lstsq(rows, numpy.vstack([root * gap, damping * start]), rcond=None)[0].T
    got = replacement_weight(weight, replacement, torch.tensor(kept), ridge=0.02)
    numpy.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-8)
