"""Layers trained by themselves, in every layout, against autograd over transformers' models and Adam by hand."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from compactlm_nemo.artifacts import damaged_seals
from compactlm_nemo.data.marks import mark
from compactlm_nemo.errors import NumericsError
from compactlm_nemo.models.build import global_names, tp_share
from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.pruning.block_distillation import BlockDistillation, BlockTraining
from compactlm_nemo.pruning.residual_stream import HiddenCut, RotatedStream, Selection
from compactlm_nemo.pruning.rotation import Rotation
from compactlm_nemo.stages.kept_layers import KeptLayers
from tests.pruning.test_cut import EVERY, HIDDEN, LAYERS, plan_of, student_of
from tests.pruning.test_reconstruct_sequential import plain_source
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import EAGER, VOCAB, save_tiny, tiny_config

LR, PASSES, BATCH, SEED = 1e-2, 4, 4, 7
STEPS = 2  # of four windows and of three, to which two data-parallel ranks add one that does not count
CASES = {
    "selected": ("llama", HIDDEN),
    "turned": ("gemma3", HIDDEN),
    "whole": ("qwen3", EVERY),
    "experts": ("qwen3_moe", EVERY),
}
"""Name -> model and kept channels; "turned": the teacher's stream is also turned."""


def inputs_of(case: str) -> tuple[bool, ...]:
    """Values of `from_teacher`: with uncut layers the last one's loss is 0 on the teacher's stream."""
    return (False,) if case == "experts" else (False, True)


def windows() -> Tensor:
    """Seven windows of 24 tokens, of which two thirds count and the last three nowhere."""
    rng = torch.Generator().manual_seed(6)
    counts_NS = torch.rand(7, 24, generator=rng) < 0.67
    counts_NS[:, -3:] = False
    return mark(torch.randint(0, VOCAB, (7, 24), generator=rng), counts_NS)


def turn() -> Rotation:
    rng = torch.Generator().manual_seed(5)
    basis_HK = torch.linalg.qr(torch.randn(48, len(HIDDEN), generator=rng, dtype=torch.float64)).Q
    scale_H = torch.rand(48, generator=rng, dtype=torch.float64) + 0.5
    return Rotation(basis_HK, scale_H, torch.ones(len(HIDDEN)), is_tied=True, energy_H=torch.ones(48))


def hidden_cut(case: str) -> HiddenCut:
    if case == "turned":
        return RotatedStream(turn(), None, 1e-3)  # type: ignore[arg-type]  # the map of the stream reads no moments
    return Selection(torch.tensor(CASES[case][1]))


def reference(case: str, big: Any, small: Any, *, from_teacher: bool) -> Any:
    """The student after training, by transformers' modules, autograd and Adam by hand."""
    marked, rotation = windows(), turn()
    ids, counts = torch.where(marked < 0, -1 - marked, marked), (marked >= 0).double()

    def to_student(h: Tensor) -> Tensor:
        return (h * rotation.scale_H) @ rotation.basis_HK if case == "turned" else h[..., CASES[case][1]]

    streams: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, i=i: streams.__setitem__(i, first(out)))
        for i, layer in enumerate(big.model.layers)
    ]
    with torch.no_grad():
        big(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, end in zip((0, 1), (LAYERS[1], 4), strict=True):
        target = to_student(streams[end - 1])
        inputs = to_student(streams[LAYERS[1] - 1]) if from_teacher and layer == 1 else None
        _train(small, layer, ids, counts, target, inputs)
    return small


def first(out: Any) -> Tensor:
    return (out[0] if isinstance(out, tuple) else out).detach()


def _train(small: Any, layer: int, ids: Tensor, counts: Tensor, target: Tensor, inputs: Tensor | None) -> None:
    module, seen = small.model.layers[layer], {}
    parameters = list(module.parameters())

    def replaced(_: Any, args: Any, kwargs: Any) -> Any:
        if inputs is not None:
            args = (inputs[seen["rows"]], *args[1:])
        return args, kwargs

    def keep(_: Any, args: Any, out: Any) -> None:
        seen["y"] = out[0] if isinstance(out, tuple) else out

    hooks = [module.register_forward_pre_hook(replaced, with_kwargs=True), module.register_forward_hook(keep)]
    sizes = sizes_of(module, small.config.model_type == "gemma3_text")
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    rng, number, total = torch.Generator().manual_seed(SEED), 0, PASSES * STEPS
    for _ in range(PASSES):
        for step in torch.randperm(STEPS, generator=rng).tolist():
            rows = seen["rows"] = slice(BATCH * step, BATCH * (step + 1))
            small(ids[rows], use_cache=False)
            error = ((seen["y"] - target[rows]) ** 2).mean(-1) / (target[rows] ** 2).mean(-1)
            loss = (error * counts[rows]).sum() / counts[rows].sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            lr = LR * (1 + math.cos(math.pi * number / total)) / 2  # a twentieth of 8 steps is less than one
            number += 1
            with torch.no_grad():
                for p, g, size, (m, v) in zip(parameters, gradients, sizes, moments, strict=True):
                    g = torch.zeros_like(p) if g is None else g
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.95).add_(0.05 * g * g)
                    p -= lr * size * (m / (1 - 0.9**number)) / ((v / (1 - 0.95**number)).sqrt() + 1e-8)
    for hook in hooks:
        hook.remove()


def sizes_of(module: Any, is_one_plus: bool) -> list[Tensor]:
    """Root mean squares: queries, keys and values are one weight, gate and the other half too, each expert is one."""
    sizes, named = [], dict(module.named_parameters())
    for name, parameter in named.items():
        parts = [parameter.detach()]
        for one in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if (part := f"{name}.".split(".")[-3]) in one:
                parts = [named[name.replace(part, other)].detach() for other in one]
        squares = torch.cat([(x + (is_one_plus and "norm" in name)) ** 2 for x in parts], dim=0)
        if parameter.dim() == 3:
            sizes.append(squares.mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-3))
        else:
            sizes.append(squares.mean().sqrt().clamp(min=1e-3))
    return sizes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blocks")
    for case, (model, hidden) in CASES.items():
        save_tiny(model, root / case)
        if case == "experts":
            _without_layers(model, root / case, root / f"{case}_cut")
        else:
            dims, source = open_hf(root / case)
            cut = plain_source(dims, source, hidden)[1]
            export_hf(root / case, root / f"{case}_cut", student_of(dims, hidden), cut, torch.float32)
        for from_teacher in inputs_of(case):
            big, small = (
                AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float64, **EAGER).eval()
                for name in (case, f"{case}_cut")
            )
            trained = reference(case, big, small, from_teacher=from_teacher)
            trained.save_pretrained(root / f"{case}_{from_teacher}")
    return root


def _without_layers(case: str, teacher: Path, folder: Path) -> None:
    """Write the teacher with LAYERS alone."""
    big = AutoModelForCausalLM.from_pretrained(teacher, **EAGER)
    small = AutoModelForCausalLM.from_config(tiny_config(case, num_hidden_layers=len(LAYERS)), **EAGER)
    state = {k: v for k, v in big.state_dict().items() if ".layers." not in k}
    for j, i in enumerate(LAYERS):
        before = f"model.layers.{i}."
        state |= {
            f"model.layers.{j}.{k.removeprefix(before)}": v for k, v in big.state_dict().items() if k.startswith(before)
        }
    small.load_state_dict(state)
    small.save_pretrained(folder)


def distillation(case: str, root: Path, mesh: Mesh, **changes: Any) -> BlockDistillation:
    """The training of a cut student of the teacher in `root`, ready to run."""
    training = BlockTraining(lr=LR, passes=PASSES, batch=BATCH, micro_batch=2, seed=SEED, from_teacher=False)
    return BlockDistillation(
        student=filled(root / f"{case}_cut", mesh)[1],
        teacher=filled(root / case, mesh)[1],
        plan=plan_of(CASES[case][1]),
        hidden=hidden_cut(case),
        windows_NS=windows(),
        training=replace(training, **changes),
    )


def differences(model: Any, folder: Path, start: Path, mesh: Mesh) -> float:
    """Assert that this rank's weights are those of a folder, within a share of what training moved them."""
    dims, wanted = open_hf(folder)
    before, worst = open_hf(start)[1], 0.0
    for name, parameter in global_names(model):
        if name == OUTPUT_LAYER and dims.tied_embeddings:
            name = EMBEDDING
        want, old = (
            tp_share(
                name, source(name).double(), rank=mesh.tp_rank, size=mesh.tp_size, gated=dims.gated_mlp,
                padded_vocab=dims.padded_vocab(mesh.tp_size, 8),
            )
            for source in (wanted, before)
        )  # fmt: skip
        is_layer = name.startswith("decoder.layers.")
        moved = (want - old).norm()
        assert moved > 0 or not is_layer, name
        worst = max(worst, float((parameter.double() - want).norm() / (moved if is_layer else 1)))
    return worst


def _matches(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        for from_teacher in inputs_of(case):
            training = distillation(case, root, mesh, from_teacher=from_teacher)
            done = list[int]()
            training.run(done.append)
            assert sum(done) == 2 and training.losses.keys() == {0, 1}
            assert all(after < before for before, after in training.losses.values())
            worst = differences(training.student, root / f"{case}_{from_teacher}", root / f"{case}_cut", mesh)
            assert worst < 2e-3, (case, from_teacher, worst)


DENSE = ("selected", "turned", "whole")


@pytest.mark.parametrize(
    "layout, cases",
    [
        ("1", tuple(CASES)),
        ("dp2", DENSE),
        ("pp2", DENSE),
        ("tp2", DENSE),
        ("tp2_sp_cp2", DENSE),
        ("ep2_dp4", ("experts",)),
        ("tp2_sp_ep2", ("experts",)),
    ],
)
def test_trained_layers_are_those_of_adam_by_hand(layout, cases, root, tmp_path):
    world, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_matches, world, tmp_path, fields, cases, root)


def _goes_on(rank: int, world: int, layout: dict[str, Any], case: str, root: Path, folder: Path) -> None:
    mesh = mesh_of(**layout)
    for from_teacher in (False, True):
        runs = []
        for name in ("whole", "again"):
            state = folder / f"{from_teacher}_{name}"
            state.mkdir(exist_ok=True)
            dist.barrier()
            training = distillation(case, root, mesh, from_teacher=from_teacher)
            if name == "again" and rank == 0:  # what a run had kept that was killed in its second layer
                for path in (folder / f"{from_teacher}_whole").glob("*layer_0_*"):
                    shutil.copy(path, state / path.name)
            dist.barrier()
            store = KeptLayers(state, 2, mesh)
            assert store.finished == (set() if name == "whole" else {0})
            training = replace(training, store=store)
            training.run(lambda done: None)
            assert KeptLayers(state, 2, mesh).finished == {0, 1}
            if rank == 0:
                assert not damaged_seals(state)
            runs.append((training.losses, [parameter.clone() for parameter in training.student.parameters()]))
        assert runs[0][0] == runs[1][0]
        assert all(map(torch.equal, runs[0][1], runs[1][1]))


@pytest.mark.parametrize("layout, case", [("tp2_pp2", "whole"), ("ep2", "experts")])
def test_a_run_that_kept_a_layer_goes_on_to_the_same_bits(layout, case, root, tmp_path):
    world, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_goes_on, world, tmp_path, fields, case, root, tmp_path)


def _odd(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    hopeless = distillation("selected", root, mesh, lr=1e30)
    with pytest.raises(NumericsError, match=r"the loss of layer 0 is (nan|inf) after training; lower prune.block_lr"):
        hopeless.run(lambda done: None)
    far = distillation("selected", root, mesh, lr=30.0)
    before = [parameter.clone() for parameter in far.student.parameters()]
    far.run(lambda done: None)
    assert all(after == start for start, after in far.losses.values())
    assert all(map(torch.equal, before, far.student.parameters()))
    assert all(parameter.requires_grad for parameter in far.student.parameters())


def test_what_is_not_finite_is_refused_and_what_got_worse_is_not_kept(root, tmp_path):
    run_ranks(_odd, 1, tmp_path, root)


def _half(rank: int, world: int, root: Path) -> None:
    """Steps of 1e-4 are below what bf16 can add to most weights: only float32 copies sum them up."""
    mesh, layer = mesh_of(), {}
    for dtype in (torch.float32, torch.bfloat16):
        training = distillation("selected", root, mesh, lr=1e-4, passes=40)
        student, teacher = (filled(root / name, mesh, dtype=dtype)[1] for name in ("selected_cut", "selected"))
        start = torch.cat([p.double().flatten() for p in next(iter(student.layers())).parameters()])
        replace(training, student=student, teacher=teacher).run(lambda done: None)
        end = torch.cat([p.double().flatten() for p in next(iter(student.layers())).parameters()])
        layer[dtype] = end - start
    fine, coarse = layer.values()
    assert float(fine @ coarse / (fine.norm() * coarse.norm())) > 0.5
    assert float(coarse @ fine / (fine @ fine)) > 0.7  # in the mean the rounded weights go the whole way


def test_weights_of_a_bf16_model_are_moved_in_float32(root, tmp_path):
    run_ranks(_half, 1, tmp_path, root)
