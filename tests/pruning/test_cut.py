"""Cutting against an independent slice of the Hugging Face tensors, and against a dense model with units zeroed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compactlm_nemo.models.build import build_model, fill
from compactlm_nemo.models.checkpoint import CheckpointSource, save_model
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import parameter_shapes
from compactlm_nemo.models.hf import count_params, export_hf, open_hf
from compactlm_nemo.pruning.cut import CutSource
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.search.cost import num_params
from tests.megatron import LAYOUTS, filled, mesh_of
from tests.models.tiny import CASES, EXPERT_CASES, save_tiny, tokens
from tests.ranks import run_ranks

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


def export_cut(teacher: Path, target: Path, hidden: list[int]) -> Dims:
    dims, source = open_hf(teacher)
    student = student_of(dims, hidden)
    export_hf(teacher, target, student, CutSource(dims, plan_of(hidden), source), torch.float32)
    return student


@pytest.mark.parametrize("case", [case for case in CASES if case not in EXPERT_CASES])
def test_cut_is_the_slice_of_every_tensor(case, tmp_path):
    save_tiny(case, tmp_path / "teacher")
    student = export_cut(tmp_path / "teacher", tmp_path / "student", HIDDEN)
    want = sliced(load_file(tmp_path / "teacher" / "model.safetensors"), HIDDEN)
    got = load_file(tmp_path / "student" / "model.safetensors")
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
        save_model(out / case / "teacher", teacher, mesh)
        dist.barrier()
        student = student_of(dims, HIDDEN)
        model = build_model(student, mesh, dtype=torch.float32, vocab_multiple=8)
        cut = CutSource(dims, plan_of(HIDDEN), CheckpointSource(out / case / "teacher", dims))
        fill(model, student, mesh, cut, vocab_multiple=8)
        save_model(out / case / "student", model, mesh)
        dist.barrier()
        if rank == 0:
            want = CutSource(dims, plan_of(HIDDEN), open_hf(root / case)[1])  # checked above against plain indexing
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
