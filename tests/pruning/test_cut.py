"""Cutting against an independent slice of the Hugging Face tensors, and against a dense model with units zeroed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.build import ParameterSource, build_model, fill
from compactlm_nemo.models.checkpoint import CheckpointSource, save_model
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf import count_params, export_hf, open_hf
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.pruning.cut import CutSource, NarrowedSource
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.pruning.residual_stream import Selection
from compactlm_nemo.search.cost import num_params
from tests.support.meshes import LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import CASES, EXPERT_CASES, LATENT_CASES, save_tiny, tokens

HEAD_DIM = 16
LAYERS = [0, 3]
HEADS = {0: [1, 2], 3: [0, 3]}  # of 4 in 2 groups
MLP = {0: list(range(0, 80, 2)), 3: [*range(10), *range(50, 80)]}
HIDDEN = [0, 2, *range(5, 35)]
EVERY = list(range(48))


def plan_of(hidden: list[int]) -> Plan:
    return Plan(
        layers=LAYERS,
        heads={i: torch.tensor(HEADS[i]) for i in LAYERS},
        mlp={i: torch.tensor(MLP[i]) for i in LAYERS},
        hidden=torch.tensor(hidden),
    )


def student_source(dims: Dims, plan: Plan, source: ParameterSource) -> ParameterSource:
    """Plain cut, nothing refitted."""
    return NarrowedSource(CutSource(dims, plan, source), dims, plan.layers, Selection(plan.hidden))


def student_of(teacher: Dims, hidden: list[int]) -> Dims:
    return teacher.with_shape(layers=2, hidden=len(hidden), ffn=40, heads=2)


def sliced(tensors: dict[str, Tensor], hidden: list[int]) -> dict[str, Tensor]:
    """The student's Hugging Face tensors by plain indexing of the teacher's, one rule for each name."""
    wanted = {}
    for name, full in tensors.items():
        if not name.startswith("model.layers."):
            wanted[name] = full[..., hidden]
            continue
        layer = int(name.split(".")[2])
        if layer not in LAYERS:
            continue
        channels = [head * HEAD_DIM + i for head in HEADS[layer] for i in range(HEAD_DIM)]
        part, kind = name.split(".")[-2:]
        rows = {"q_proj": channels, "gate_proj": MLP[layer], "up_proj": MLP[layer]}.get(part)
        if part in ("q_norm", "k_norm"):
            cut = full
        elif part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            cut = full if rows is None else full[rows]
            cut = cut[:, hidden] if kind == "weight" else cut
        elif part in ("o_proj", "down_proj"):
            cut = full[hidden]
            cut = cut[:, channels if part == "o_proj" else MLP[layer]] if kind == "weight" else cut
        else:
            cut = full[hidden]  # a norm
        wanted[name.replace(f"layers.{layer}.", f"layers.{LAYERS.index(layer)}.")] = cut
    return wanted


def unfused(tensors: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Query, key and value projections by themselves, gate and up too, where a family stores them as one."""
    split = {}
    for name, full in tensors.items():
        if name.endswith(".qkv_proj.weight"):
            rows = [count * HEAD_DIM for count in (heads, 2, 2)]
            parts = dict(zip(("q_proj", "k_proj", "v_proj"), full.split(rows), strict=True))
        elif name.endswith(".gate_up_proj.weight"):
            parts = dict(zip(("gate_proj", "up_proj"), full.chunk(2), strict=True))
        else:
            parts = {name.split(".")[-2]: full}
        split |= {name.replace(name.split(".")[-2], part): tensor for part, tensor in parts.items()}
    return split


def export_cut(teacher: Path, target: Path, hidden: list[int]) -> Dims:
    dims, source = open_hf(teacher)
    student = student_of(dims, hidden)
    export_hf(teacher, target, student, student_source(dims, plan_of(hidden), source), torch.float32)
    return student


# With longrope the hidden size of a Phi-3 is tied to its heads, and those of OLMo-2 stay.
TIED = ("phi3_tied_longrope", "olmo2", "olmo2_tied_bias")


@pytest.mark.proves("axes", ["layers", "hidden", "ffn", "heads"], "{case}", "cut")
@pytest.mark.parametrize("case", [case for case in CASES if case not in (*EXPERT_CASES, *LATENT_CASES, *TIED)])
def test_cut_is_the_slice_of_every_tensor(case, tmp_path):
    save_tiny(case, tmp_path / "teacher")
    student = export_cut(tmp_path / "teacher", tmp_path / "student", HIDDEN)
    want = sliced(unfused(load_file(tmp_path / "teacher" / "model.safetensors"), 4), HIDDEN)
    if case.startswith("gemma3"):  # which multiplies the table by the root of its own width
        ratio = math.sqrt(48 / len(HIDDEN))
        want["model.embed_tokens.weight"] = (want["model.embed_tokens.weight"].double() * ratio).float()
        if "untied" not in case:
            want["model.norm.weight"] = ((want["model.norm.weight"].double() + 1) / ratio - 1).float()
    got = unfused(load_file(tmp_path / "student" / "model.safetensors"), 2)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert count_params(tmp_path / "student") == num_params(student) == sum(t.numel() for t in want.values())


def _zeroed(model: Any) -> Any:
    """The dense model without the dropped layers, the inputs of its output projections zero at dropped units."""

    def keep(channels: list[int]) -> Any:
        def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            mask = torch.zeros(args[0].shape[-1])
            mask[channels] = 1
            return (args[0] * mask,)

        return hook

    for i in LAYERS:
        layer = model.model.layers[i]
        channels = [head * HEAD_DIM + c for head in HEADS[i] for c in range(HEAD_DIM)]
        layer.self_attn.o_proj.register_forward_pre_hook(keep(channels))
        layer.mlp.down_proj.register_forward_pre_hook(keep(MLP[i]))
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in LAYERS)
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
    model.config.num_hidden_layers = len(LAYERS)
    return model


@pytest.mark.parametrize("case", ["llama", "qwen3_tied", "nemotron_tied_biases"])
def test_pruned_model_is_the_dense_one_with_units_zeroed(case, tmp_path):
    dense = _zeroed(save_tiny(case, tmp_path / "teacher"))
    export_cut(tmp_path / "teacher", tmp_path / "student", EVERY)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "student", attn_implementation="eager").eval()
    with torch.no_grad():
        want, got = (model(tokens(), use_cache=False).logits for model in (dense, pruned))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _same_checkpoint(rank: int, world: int, layout: str, root: Path, out: Path) -> None:
    """Teacher checkpoint -> student checkpoint on this layout, read back as whole parameters."""
    mesh = mesh_of(**LAYOUTS[layout][1])
    for case in ("llama", "qwen2_tied", "nemotron"):
        dims, teacher = filled(root / case, mesh)
        save_model(out / case / "teacher", teacher)
        dist.barrier()
        student = student_of(dims, HIDDEN)
        model = build_model(student, mesh, dtype=torch.float32, vocab_multiple=8)
        cut = student_source(dims, plan_of(HIDDEN), CheckpointSource(out / case / "teacher", dims))
        fill(model, cut, vocab_multiple=8)
        save_model(out / case / "student", model)
        dist.barrier()
        if rank == 0:
            want = student_source(
                dims, plan_of(HIDDEN), open_hf(root / case)[1]
            )  # checked above against plain indexing
            got = CheckpointSource(out / case / "student", student)
            for name in parameter_shapes(student):
                assert torch.equal(got(name), want(name)), (case, name)
        dist.barrier()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for case in ("llama", "qwen2_tied", "nemotron"):
        save_tiny(case, root / case)
    return root


@pytest.mark.parametrize("layout", ["1", "tp2_pp2", "pp1_3", "tp2_sp_cp2"])
def test_every_layout_makes_the_same_student(layout, teachers, tmp_path):
    run_ranks(_same_checkpoint, LAYOUTS[layout][0], tmp_path, layout, teachers, tmp_path / "out")


EXPERTS = {0: [3, 1], 3: [0, 2]}
"""Kept experts of four, to be sorted; and of each a different set of neurons."""
NEURONS = {0: [0, 5, 7, 20], 1: [1, 2, 3, 23], 2: [8, 9, 10, 11], 3: [0, 1, 22, 23]}
SHARED = list(range(1, 40, 3))


def expert_plan(shared: bool) -> Plan:
    experts = {i: torch.tensor(sorted(kept)) for i, kept in EXPERTS.items()}
    return Plan(
        layers=LAYERS,
        hidden=torch.tensor(HIDDEN),
        heads={0: torch.tensor([2, 3]), 3: torch.tensor([0, 1])},  # one whole group of two
        experts=experts,
        expert_mlp={i: {e: torch.tensor(NEURONS[e]) for e in kept.tolist()} for i, kept in experts.items()},
        shared_expert={i: torch.tensor(SHARED) for i in LAYERS} if shared else {},
    )


def unmerged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the other families store them: every expert's matrices by themselves, rows outputs, the router a gate."""
    split: dict[str, Tensor] = {}
    for name, full in tensors.items():
        if ".mlp.router." in name:
            split[name.replace(".router.", ".gate.")] = full
            continue
        prefix, _, matrix = name.partition(".experts.")
        if not matrix.startswith(("gate_up_proj", "down_proj")) or "." in matrix:
            split[name] = full
            continue
        kind = "bias" if matrix.endswith("_bias") else "weight"
        for expert, own in enumerate(full):
            rows = own if kind == "bias" else own.T
            is_down = matrix.startswith("down_proj")
            parts = {"down_proj": rows} if is_down else {"gate_proj": rows[0::2], "up_proj": rows[1::2]}
            split |= {f"{prefix}.experts.{expert}.{part}.{kind}": value for part, value in parts.items()}
    return split


def sliced_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `sliced`, for `expert_plan`."""
    wanted = {}
    for name, full in tensors.items():
        if not name.startswith("model.layers."):
            wanted[name] = full[..., HIDDEN]
            continue
        layer = int(name.split(".")[2])
        if layer not in LAYERS:
            continue
        new = name.replace(f"layers.{layer}.", f"layers.{LAYERS.index(layer)}.")
        group = {0: 1, 3: 0}[layer]
        queries = slice(group * 2 * HEAD_DIM, (group + 1) * 2 * HEAD_DIM)
        keys = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
        kept = sorted(EXPERTS[layer])
        part, kind = name.split(".")[-2:]
        if ".experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            if expert not in kept:
                continue
            new = new.replace(f".experts.{expert}.", f".experts.{kept.index(expert)}.")
            is_down = part in ("w2", "down_proj")
            cut = full[HIDDEN if is_down else NEURONS[expert]]
            cut = cut[:, NEURONS[expert] if is_down else HIDDEN] if kind == "weight" else cut
        elif ".shared_expert." in name:
            cut = full[HIDDEN][:, SHARED] if part == "down_proj" else full[SHARED][:, HIDDEN]
        elif part == "shared_expert_gate":
            cut = full[:, HIDDEN]
        elif part == "gate":
            cut = full[kept][:, HIDDEN] if kind == "weight" else full[kept]
        elif kind == "sinks":
            cut = full[group * 2 : group * 2 + 2]
        elif part in ("q_proj", "k_proj", "v_proj"):
            cut = full[queries if part == "q_proj" else keys]
            cut = cut[:, HIDDEN] if kind == "weight" else cut
        elif part == "o_proj":
            cut = full[HIDDEN][:, queries] if kind == "weight" else full[HIDDEN]
        else:
            cut = full if part in ("q_norm", "k_norm") else full[HIDDEN]
        wanted[new] = cut
    return wanted


@pytest.mark.proves("axes", list(AXES), "{case}", "cut")
@pytest.mark.parametrize("case", [case for case in EXPERT_CASES if not case.endswith("top1")])
def test_experts_and_groups_are_the_slice_of_every_tensor(case, tmp_path):
    save_tiny(case, tmp_path / "teacher")
    dims, source = open_hf(tmp_path / "teacher")
    has_shared = dims.shared_expert_ffn > 0
    student = dims.with_shape(
        layers=2, hidden=len(HIDDEN), ffn=4, heads=2, groups=1, experts=2,
        shared_expert_ffn=len(SHARED) if has_shared else 0,
    )  # fmt: skip
    cut = student_source(dims, expert_plan(has_shared), source)
    export_hf(tmp_path / "teacher", tmp_path / "student", student, cut, torch.float32)
    teacher, got = (unmerged(load_file(tmp_path / name / "model.safetensors")) for name in ("teacher", "student"))
    want = sliced_experts(teacher)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert count_params(tmp_path / "student") == num_params(student)


@pytest.mark.parametrize("case", ["llama_biases", "qwen3"])
def test_merged_heads_have_the_merged_queries(case, tmp_path):
    """One head of each group stays and takes in the other: rows of the query projection become 2 W_i - W_j."""
    save_tiny(case, tmp_path / "teacher")
    dims, source = open_hf(tmp_path / "teacher")
    plan = replace(plan_of(EVERY), merge={0: [(1, 0), (2, 3)], 3: [(0, 1), (3, 2)]})
    cut = student_source(dims, plan, source)
    export_hf(tmp_path / "teacher", tmp_path / "student", student_of(dims, EVERY), cut, torch.float32)
    teacher, got = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "student"))
    for name, full in teacher.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        if layer in LAYERS and ".q_proj." in name:
            heads = full.unflatten(0, (4, HEAD_DIM))
            want = torch.cat([2 * heads[kept] - heads[gone] for kept, gone in plan.merge[layer]])
            assert torch.equal(got[name.replace(f"layers.{layer}.", f"layers.{LAYERS.index(layer)}.")], want), name
        elif layer in LAYERS and (".k_proj." in name or ".v_proj." in name):
            assert torch.equal(got[name.replace(f"layers.{layer}.", f"layers.{LAYERS.index(layer)}.")], full), name


def test_merged_heads_have_the_merged_sinks(tmp_path):
    save_tiny("gpt_oss", tmp_path)
    dims, source = open_hf(tmp_path)
    cut = CutSource(dims, replace(plan_of(EVERY), merge={0: [(1, 0), (2, 3)]}), source)
    name = "decoder.layers.{}.self_attention.core_attention.softmax_offset"
    first, last = (source(name.format(layer)).tolist() for layer in LAYERS)
    assert HEADS[0] == [1, 2] and len(set(first + last)) == 8
    want = torch.tensor([2 * first[1] - first[0], 2 * first[2] - first[3]])
    torch.testing.assert_close(cut(name.format(0)), want, rtol=1e-6, atol=1e-6)
    assert cut(name.format(1)).tolist() == [last[head] for head in HEADS[LAYERS[1]]]


def test_a_llama_whose_heads_do_not_divide_its_width_loads_as_mistral(tmp_path):
    """transformers refuses it as a llama; the same weights under a llama config that is not checked give its logits."""
    save_tiny("llama", tmp_path / "teacher")
    export_cut(tmp_path / "teacher", tmp_path / "student", HIDDEN[:31])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", attn_implementation="eager").eval()
    assert model.config.model_type == "mistral" and model.config.sliding_window is None
    config = AutoConfig.from_pretrained(tmp_path / "teacher", attn_implementation="eager")
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers = 31, 40, 2, 2
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(load_file(tmp_path / "student" / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, llama(tokens()).logits, rtol=1e-5, atol=1e-5)
