"""Random cuts of heads, query groups, experts and neurons against transformers with those units silenced by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from compactlm_nemo.models.build import build_model, fill
from compactlm_nemo.models.checkpoint import CheckpointSource, save_model
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.pruning import cut as cut_module
from compactlm_nemo.pruning.cut import CutSource, NarrowedSource
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.pruning.residual_stream import Selection
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS, VOCAB_MULTIPLE, filled, mesh_of, whole_logits
from tests.support.ranks import run_ranks
from tests.support.tiny_models import EAGER, EXPERT_CASES, save_tiny, tokens

DENSE = (
    "llama_biases",
    "gemma3",
    "qwen3",
    "nemotron_tied_biases",
    "smollm3",
    "phi3",
    "granite_tied_biases",
    "glm",
    "olmo2",
    "glm4",
)
LATENT = ("deepseek_v3", "deepseek_v2", "deepseek_v3_tied_plain")
MIXED = (*EXPERT_CASES, *LATENT)
CASES = (*DENSE, *MIXED)


def save_teacher(case: str, folder: Path) -> Any:
    """A case with 8 heads in 4 groups and, where it has experts, 6 of them; with latents 8 of either."""
    if case in LATENT:
        return save_tiny(case, folder, num_attention_heads=8, num_key_value_heads=8)
    count = "num_local_experts" if case == "mixtral" or case.startswith("gpt_oss") else "num_experts"
    experts = {count: 6} if case in EXPERT_CASES else {}
    return save_tiny(case, folder, num_attention_heads=8, num_key_value_heads=4, **experts)


def student_of(teacher: Dims, *, hidden: int, heads: int, groups: int, experts: int) -> Dims:
    if teacher.qk_norm_over_heads:
        heads, groups = teacher.num_heads, teacher.num_query_groups
    if teacher.kv_lora_rank:
        shared = teacher.shared_expert_ffn // teacher.ffn_hidden_size * 10
        return teacher.with_shape(
            layers=3, hidden=hidden, ffn=10, heads=heads, groups=heads, experts=6, shared_expert_ffn=shared
        )
    return teacher.with_shape(
        layers=3, hidden=hidden, ffn=10, heads=heads, groups=groups,
        experts=experts if teacher.num_experts else 0,
        shared_expert_ffn=14 if teacher.shared_expert_ffn else 0,
    )  # fmt: skip


def random_plan(teacher: Dims, student: Dims, seed: int) -> Plan:
    """Any units, in every layer others; every kept group keeps equally many heads."""
    draw = random.Random(seed)

    def some(count: int, kept: int) -> list[int]:
        return sorted(draw.sample(range(count), kept))

    def heads() -> list[int]:
        of_group = teacher.num_heads // teacher.num_query_groups
        groups = some(teacher.num_query_groups, student.num_query_groups)
        return [group * of_group + h for group in groups for h in some(of_group, student.num_heads // len(groups))]

    def neurons() -> Tensor:
        return torch.tensor(some(teacher.ffn_hidden_size, student.ffn_hidden_size))

    def some_experts() -> list[int]:
        """Equally many of each of the router's groups."""
        size, kept = (dims.num_experts // teacher.expert_groups for dims in (teacher, student))
        return [group * size + e for group in range(teacher.expert_groups) for e in some(size, kept)]

    layers = some(teacher.num_layers, student.num_layers)
    mixed = [i for i in layers if not teacher.is_dense(i)]
    experts = {i: some_experts() for i in mixed}
    shared = mixed if teacher.shared_expert_ffn else []
    return Plan(
        layers=layers,
        hidden=torch.tensor(some(teacher.hidden_size, student.hidden_size)),
        heads={i: torch.tensor(heads()) for i in layers},
        mlp={} if teacher.num_experts else {i: neurons() for i in layers},
        experts={i: torch.tensor(experts[i]) for i in mixed},
        expert_mlp={i: {e: neurons() for e in experts[i]} for i in mixed},
        shared_expert={
            i: torch.tensor(some(teacher.shared_expert_ffn, student.shared_expert_ffn)) for i in shared
        },
    )  # fmt: skip


def export_cut(teacher: Path, folder: Path, student: Dims, plan: Plan) -> None:
    dims, source = open_hf(teacher)
    cut = NarrowedSource(CutSource(dims, plan, source), dims, plan.layers, Selection(plan.hidden))
    export_hf(teacher, folder, student, cut, torch.float32)


def silenced(model: Any, plan: Plan, dims: Dims) -> Any:
    """The model, changed: removed layers gone, removed heads and neurons write 0, removed experts are never picked."""

    def keep_columns(weight_OE: Tensor, kept: list[int]) -> None:
        for column in set(range(weight_OE.shape[1])) - set(kept):
            weight_OE.data[:, column] = 0

    for i in plan.layers:
        layer = model.model.layers[i]
        channels = [head * dims.head_dim + c for head in plan.heads[i].tolist() for c in range(dims.head_dim)]
        keep_columns(layer.self_attn.o_proj.weight, channels)
        if not dims.num_experts:
            keep_columns(layer.mlp.down_proj.weight, plan.mlp[i].tolist())
            continue
        if i not in plan.experts:
            continue  # a dense layer among others
        for expert in plan.experts[i].tolist():
            down = layer.mlp.experts.down_proj[expert]
            keep_columns(down.T if dims.router_bias else down, plan.expert_mlp[i][expert].tolist())
        picks = picks_only_in_groups if dims.kv_lora_rank else picks_only
        router = layer.mlp.gate if hasattr(layer.mlp, "gate") else layer.mlp.router
        router.register_forward_hook(picks(plan.experts[i].tolist(), dims))
        if dims.shared_expert_ffn:
            shared = getattr(layer.mlp, "shared_experts", None) or layer.mlp.shared_expert
            keep_columns(shared.down_proj.weight, plan.shared_expert[i].tolist())
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in plan.layers)
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
    model.config.num_hidden_layers = len(plan.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in plan.layers]
    return model


def picks_only(kept: list[int], dims: Dims) -> Any:
    """Forward hook of a router: logits of all experts but these are -inf; gates and choice by the definition.

    The logits come from the router's weight: what a router returns first are logits or probabilities, by version.
    """

    def route(router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        all_NE = args[0].reshape(-1, args[0].shape[-1]) @ router.weight.T
        if dims.router_bias:
            all_NE = all_NE + router.bias
        logits_NE = torch.full_like(all_NE, -torch.inf)
        logits_NE[:, kept] = all_NE[:, kept]
        weight_NE = logits_NE.exp()
        gate_NE = weight_NE / weight_NE.sum(dim=-1, keepdim=True)
        picked_NK = gate_NE.argsort(dim=-1, descending=True)[:, : dims.experts_per_token]
        gate_NK = gate_NE.gather(1, picked_NK)
        return logits_NE, gate_NK / gate_NK.sum(dim=-1, keepdim=True) if dims.norm_topk else gate_NK, picked_NK

    return route


def picks_only_in_groups(kept: list[int], dims: Dims) -> Any:
    """The same of DeepSeek's routers, token by token in plain Python; a softmax is over the experts that stay."""

    def gates_of(logits_E: Tensor, bias_E: Tensor | None) -> dict[int, float]:
        if dims.sigmoid_gates:
            scores = {e: 1 / (1 + math.exp(-float(logits_E[e]))) for e in kept}
        else:
            total = sum(math.exp(float(logits_E[e])) for e in kept)
            scores = {e: math.exp(float(logits_E[e])) / total for e in kept}
        choice = {e: score + (0.0 if bias_E is None else float(bias_E[e])) for e, score in scores.items()}
        size = dims.num_experts // dims.expert_groups
        if dims.expert_groups > 1:
            of_group: dict[int, list[float]] = {}
            for e in kept:
                of_group.setdefault(e // size, []).append(choice[e])
            number = 2 if dims.sigmoid_gates else 1
            worth = {group: sum(sorted(values)[-number:]) for group, values in of_group.items()}
            best = sorted(worth, key=worth.__getitem__)[-dims.groups_per_token :]
            choice = {e: c for e, c in choice.items() if e // size in best}
        picked = sorted(choice, key=choice.__getitem__)[-dims.experts_per_token :]
        total = sum(scores[e] for e in picked) if dims.norm_topk else 1.0
        return {e: scores[e] / total * dims.gate_scale for e in picked}

    def route(router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x_NH = args[0].reshape(-1, args[0].shape[-1]).float()
        logits_NE = x_NH @ router.weight.float().T  # in float32, as transformers does whatever the model's format
        gates = [gates_of(logits_E, getattr(router, "e_score_correction_bias", None)) for logits_E in logits_NE]
        weight_NK = torch.tensor([list(of_token.values()) for of_token in gates])
        return logits_NE, weight_NK.to(output[1].dtype), torch.tensor([list(of_token) for of_token in gates])

    return route


@pytest.mark.proves("axes", ["layers", "ffn", "heads", "groups", "experts"], "{case}", "cut")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "groups", "experts"), [(2, 2, 4), (4, 2, 3), (4, 4, 5), (1, 1, 2)])
def test_cut_model_is_the_whole_one_with_units_silenced(case, heads, groups, experts, tmp_path):
    """In float64; the residual stream stays whole, as RMSNorm's mean would change."""
    model = save_teacher(case, tmp_path / "teacher").double()
    dims, _ = open_hf(tmp_path / "teacher")
    student = student_of(dims, hidden=dims.hidden_size, heads=heads, groups=groups, experts=experts)
    plan = random_plan(dims, student, seed=100 * heads + 10 * groups + experts)
    export_cut(tmp_path / "teacher", tmp_path / "student", plan.student(dims, student), plan)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student", **EAGER).double().eval()
    with torch.no_grad():
        whole, got = (each(tokens(), use_cache=False).logits for each in (model, exported))
        want = silenced(model, plan, dims)(tokens(), use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (want - whole).abs().max() > 0.1


SHAPE = {"hidden": 32, "heads": 2, "groups": 2, "experts": 4}
"""Sizes that two tensor-parallel, expert-parallel or pipeline ranks can hold."""


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every case teacher, plan, student as transformers reads it, and its logits."""
    root = tmp_path_factory.mktemp("cut")
    for number, case in enumerate(CASES):
        folder = root / case
        save_teacher(case, folder / "teacher")
        dims, _ = open_hf(folder / "teacher")
        student = student_of(dims, **SHAPE)
        plan = random_plan(dims, student, number)
        student = plan.student(dims, student)
        (folder / "plan.json").write_text(json.dumps(plan.to_json()))
        export_cut(folder / "teacher", folder / "student", student, plan)
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(folder / "student", **EAGER).eval()
            torch.save(model(tokens()).logits, folder / "logits.pt")
    return root


def _same_student(rank: int, world: int, fields: dict[str, Any], cases: tuple[str, ...], root: Path, out: Path) -> None:
    """Teacher checkpoint -> student checkpoint on this mesh; its logits and the exported file are the fixture's."""
    mesh = mesh_of(**fields)
    mine = slice(mesh.dp_rank % 2, None, min(mesh.dp_size, 2))  # neighbours in expert parallelism see other samples
    for case in cases:
        dims, teacher = filled(root / case / "teacher", mesh)
        save_model(out / case / "teacher", teacher)
        dist.barrier()
        plan = Plan.from_json(json.loads((root / case / "plan.json").read_text()))
        student = plan.student(dims, student_of(dims, **SHAPE))
        wide = CutSource(dims, plan, CheckpointSource(out / case / "teacher", dims))
        model = build_model(student, mesh, dtype=torch.float32, vocab_multiple=VOCAB_MULTIPLE)
        narrowed = NarrowedSource(wide, dims, plan.layers, Selection(plan.hidden))
        cut_module.TABLE_ROWS = 50  # a table of 131 rows comes in blocks that end inside a rank's
        fill(model, narrowed, VOCAB_MULTIPLE, narrowed.tables)
        save_model(out / case / "student", model)
        logits = whole_logits(model.eval(), student, mesh, tokens()[mine])
        if logits is not None:
            torch.testing.assert_close(logits, torch.load(root / case / "logits.pt")[mine], rtol=0, atol=1e-4)
        dist.barrier()
        if rank == 0:
            source = CheckpointSource(out / case / "student", student)
            export_hf(root / case / "teacher", out / case / "hf", student, source, torch.float32)
            got, want = (folder / "model.safetensors" for folder in (out / case / "hf", root / case / "student"))
            assert got.read_bytes() == want.read_bytes(), case
        dist.barrier()


@pytest.mark.parametrize(
    ("layout", "cases"),
    [("pp1_3", CASES), ("tp2_pp2", DENSE), ("ep2_pp2", MIXED), ("tp2_sp_ep2", MIXED)],
)
def test_every_layout_makes_the_same_student(layout, cases, cut, tmp_path):
    world, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_same_student, world, tmp_path, fields, cases, cut, tmp_path / "out")
