"""Cuts of models whose heads are made from latents against an independent slice of the Hugging Face tensors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.hf import count_params, export_hf, open_hf
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.search.cost import num_params
from tests.pruning.test_cut import HEADS, HIDDEN, LAYERS, NEURONS, student_source
from tests.support.tiny_models import LATENT_CASES, save_tiny

GROUPED = [1, 2, 3, 4, 5, 7]
"""Kept experts of eight, three of each group."""


def sliced_latents(tensors: dict[str, Tensor], shared: list[int]) -> dict[str, Tensor]:
    """As `sliced`, of DeepSeek's models: heads of 12 + 8 channels for queries, 12 for keys and 16 for values."""
    wanted = {}
    for name, full in tensors.items():
        if not name.startswith("model.layers."):
            wanted[name] = full[..., HIDDEN]
            continue
        layer = int(name.split(".")[2])
        if layer not in LAYERS:
            continue
        new = name.replace(f"layers.{layer}.", f"layers.{LAYERS.index(layer)}.")
        part = name.split(".")[-2]
        of_heads = {
            width: [head * width + i for head in HEADS[layer] for i in range(width)] for width in (12 + 8, 12 + 16, 16)
        }
        if part in ("q_a_layernorm", "kv_a_layernorm"):
            cut = full
        elif part in ("q_a_proj", "kv_a_proj_with_mqa"):
            cut = full[:, HIDDEN]
        elif part in ("q_proj", "q_b_proj", "kv_b_proj"):
            cut = full[of_heads[28 if part == "kv_b_proj" else 20]]
            cut = cut[:, HIDDEN] if part == "q_proj" else cut
        elif part == "o_proj":
            cut = full[HIDDEN][:, of_heads[16]]
        elif ".experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            if expert not in GROUPED:
                continue
            new = new.replace(f".experts.{expert}.", f".experts.{GROUPED.index(expert)}.")
            neurons = NEURONS[expert % 4]
            cut = full[HIDDEN][:, neurons] if part == "down_proj" else full[neurons][:, HIDDEN]
        elif ".shared_experts." in name:
            cut = full[HIDDEN][:, shared] if part == "down_proj" else full[shared][:, HIDDEN]
        elif part == "gate":
            cut = full[GROUPED] if full.ndim == 1 else full[GROUPED][:, HIDDEN]
        elif part == "down_proj" or full.ndim == 1:
            cut = full[HIDDEN]  # of the dense layer, whose width stays, or a norm
        else:
            cut = full[:, HIDDEN]
        wanted[new] = cut
    return wanted


@pytest.mark.proves("axes", list(AXES), "{case}", "cut")
@pytest.mark.parametrize("case", LATENT_CASES)
def test_heads_made_from_latents_are_the_slice_of_every_tensor(case, tmp_path):
    save_tiny(case, tmp_path / "teacher")
    dims, source = open_hf(tmp_path / "teacher")
    shared = [1, 2, 3, 20, *([30, 31, 40, 47] if dims.shared_expert_ffn == 48 else [])]
    student = dims.keep_layers(LAYERS).with_shape(
        hidden=len(HIDDEN), ffn=4, heads=2, groups=2, experts=len(GROUPED), shared_expert_ffn=len(shared)
    )
    plan = Plan(
        layers=LAYERS,
        hidden=torch.tensor(HIDDEN),
        heads={i: torch.tensor(HEADS[i]) for i in LAYERS},
        experts={3: torch.tensor(GROUPED)},
        expert_mlp={3: {e: torch.tensor(NEURONS[e % 4]) for e in GROUPED}},
        shared_expert={3: torch.tensor(shared)},
    )
    export_hf(tmp_path / "teacher", tmp_path / "student", student, student_source(dims, plan, source), torch.float32)
    want = sliced_latents(load_file(tmp_path / "teacher" / "model.safetensors"), shared)
    got = load_file(tmp_path / "student" / "model.safetensors")
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert count_params(tmp_path / "student") == num_params(student)
