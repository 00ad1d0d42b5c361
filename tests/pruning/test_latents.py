"""Cuts of DeepSeek's models: plans by the router's groups, and refits of what reads the stream before the latents."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compactlm_nemo.errors import ConfigError
from compactlm_nemo.importance import names
from compactlm_nemo.importance.selection import _lengths
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.pruning.cut import CutSource, NarrowedSource
from compactlm_nemo.pruning.plan import Plan, make_plan
from compactlm_nemo.pruning.reconstruct import RefittedWriters
from compactlm_nemo.pruning.residual_stream import NormedStream, RefittedSelection
from tests.pruning.test_least_squares import fitted
from tests.pruning.test_reconstruct import RIDGE, calibration
from tests.support.tiny_models import save_tiny, tiny_config

HIDDEN = [0, 2, *range(5, 35)]
HEADS = {0: [1, 2], 2: [0, 3]}


def test_a_plan_keeps_equally_many_experts_of_each_group_and_dense_layers_whole() -> None:
    dims = dims_of(tiny_config("deepseek_v3"))
    scores = {name: torch.arange(float(length)) for name, length in _lengths(dims).items()}
    scores |= {names.groups_key(i): scores[names.heads_key(i)] for i in range(dims.num_layers)}
    scores[names.DEPTH] = torch.tensor([3.0, 0.0, 2.0, 1.0])
    scores[names.experts_key(2)] = torch.tensor([9.0, 8.0, 7.0, 6.0, 0.0, 1.0, 2.0, 3.0])
    student = dims.with_shape(layers=3, heads=2, groups=2, experts=6, ffn=12, shared_expert_ffn=24)
    plan = make_plan(dims, student, scores)
    assert plan.layers == [0, 2, 3] and plan.mlp == {}
    assert plan.experts[2].tolist() == [0, 1, 2, 5, 6, 7]
    assert plan.experts[3].tolist() == [1, 2, 3, 5, 6, 7]
    assert plan.experts.keys() == plan.shared_expert.keys() == plan.expert_mlp.keys() == {2, 3}
    assert plan.student(dims, student).dense_layers == [True, False, False]
    assert scores[names.mlp_key(0)].shape == (80,)
    with pytest.raises(ConfigError, match=r"search.experts=7 must be a multiple of 2 and at least 6"):
        make_plan(dims, student.with_shape(experts=7), scores)


@pytest.mark.proves("axes", ["hidden", "heads"], "{case}", "refitted")
@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v3_tied_plain", "deepseek_v2"])
def test_readers_of_the_stream_and_output_projections_are_least_squares_on_the_tokens(
    case: str, tmp_path: Path
) -> None:
    model = save_tiny(case, tmp_path / "teacher").double()
    seen: dict[str, Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, i=i: seen.update({f"layers.{i}.heads": args[0]})
        )
        for norm, key in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
            getattr(layer, norm).register_forward_hook(
                lambda _, args, out, i=i, key=key: seen.update({f"layers.{i}.{key}": out})
            )
    model.model.norm.register_forward_hook(lambda _, args, out: seen.update({"final_norm": out}))
    with torch.no_grad():
        model(calibration())
    tokens = {name: x.flatten(0, 1).numpy() for name, x in seen.items()}
    dims, source = open_hf(tmp_path / "teacher")
    layers, mixed = [0, 2], [layer for layer in (0, 2) if not dims.is_dense(layer)]
    every = torch.arange(dims.num_experts)
    plan = Plan(
        layers=layers,
        hidden=torch.tensor(HIDDEN),
        heads={i: torch.tensor(HEADS[i]) for i in layers},
        experts={i: every for i in mixed},
        expert_mlp={i: {e: torch.arange(dims.ffn_hidden_size) for e in every.tolist()} for i in mixed},
        shared_expert={i: torch.arange(dims.shared_expert_ffn) for i in mixed},
    )

    def moment(name: str) -> Tensor:
        return torch.from_numpy(tokens[name].T @ tokens[name]).float()

    narrow = RefittedSelection(plan.hidden, NormedStream(moment, calibration().numel(), source), RIDGE, is_rms=True)
    wide = CutSource(dims, plan, RefittedWriters(dims, plan, source, moment, RIDGE, {}))
    student = dims.keep_layers(layers).with_shape(hidden=len(HIDDEN), heads=2, groups=2)
    cut = NarrowedSource(wide, dims, layers, narrow)
    export_hf(tmp_path / "teacher", tmp_path / "student", student, cut, torch.float32)
    full, got = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "student"))
    compared = 0
    for place, layer in enumerate(layers):
        rows = {width: [head * width + c for head in HEADS[layer] for c in range(width)] for width in (16, 20, 28)}
        before = tokens[f"layers.{layer}.attention_norm"]
        for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            key = f"layers.{layer}.self_attn.{name}.weight"
            if f"model.{key}" not in full:
                continue
            weight = full[f"model.{key}"].double().numpy()
            if name == "o_proj":
                want = fitted(tokens[f"layers.{layer}.heads"], weight, rows[16], RIDGE)[HIDDEN]
            elif name in ("q_b_proj", "kv_b_proj"):
                want = weight[rows[20 if name == "q_b_proj" else 28]]
            else:
                want = fitted(before, weight[rows[20]] if name == "q_proj" else weight, HIDDEN, RIDGE)
            new = got[f"model.layers.{place}.self_attn.{name}.weight"].double().numpy()
            numpy.testing.assert_allclose(new, want, rtol=1e-4, atol=1e-4 * numpy.abs(want).max(), err_msg=key)
            compared += 1
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if (old := full.get(f"model.layers.{layer}.self_attn.{name}.weight")) is not None:
                assert torch.equal(got[f"model.layers.{place}.self_attn.{name}.weight"], old)
        if layer in mixed:
            bias = f"layers.{place}.mlp.gate.e_score_correction_bias"
            assert (f"model.{bias}" in got) == dims.sigmoid_gates
            gate = full[f"model.layers.{layer}.mlp.gate.weight"].double().numpy()
            want = fitted(tokens[f"layers.{layer}.mlp_norm"], gate, HIDDEN, RIDGE)
            new = got[f"model.layers.{place}.mlp.gate.weight"].double().numpy()
            numpy.testing.assert_allclose(new, want, rtol=1e-4, atol=1e-4 * numpy.abs(want).max())
        else:
            down = full[f"model.layers.{layer}.mlp.down_proj.weight"]
            assert torch.equal(got[f"model.layers.{place}.mlp.down_proj.weight"], down[HIDDEN]), "keeps its width"
    assert compared == (8 if dims.q_lora_rank == 0 else 10)
