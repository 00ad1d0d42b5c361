"""Families with parts of their own through the whole main job: scored, refitted, cut, taught, and loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import commands
from tests.support.tiny_models import EAGER, save_tiny
from tests.support.tiny_run import command, metrics

MIXED = ("deepseek_v3", "deepseek_v2")
REFIT = ["score.second_moments=true", "prune.reconstruct=least_squares", "search.layers=[3]", "distill.steps=24"]
EXPERTS = ["score.expert_moments=true", "search.ffn=[16]", "search.experts=[6]", "search.shared_expert_ffn=[32]"]


@pytest.mark.parametrize("case", ["smollm3", "phi3", "granite", "olmo2", "glm4", "gemma3", *MIXED])
def test_a_family_is_refitted_cut_and_taught(case: str, inputs: Path, tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    save_tiny(case, teacher, vocab_size=93, eos_token_id=0, bos_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(inputs / "teacher" / name, teacher)
    heads = 4 if case == "olmo2" else 2  # its heads stay
    sizes = EXPERTS if case in MIXED else []
    done = commands.run(command(inputs, run, f"model.source={teacher}", f"search.heads=[{heads}]", *REFIT, *sizes))
    assert done.returncode == 0, done.stderr
    folder = run / "export" / "hf"
    student, info = AutoModelForCausalLM.from_pretrained(folder, **EAGER, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    config, whole = student.config, json.loads((teacher / "config.json").read_text())
    assert (config.num_hidden_layers, config.hidden_size) == (3, 24)
    assert config.intermediate_size == (whole["intermediate_size"] if case in MIXED else 32)
    assert config.num_attention_heads == heads
    assert all(torch.isfinite(x).all() for x in student.parameters())
    losses = [values["train/loss"] for values in metrics(run)]
    assert sum(losses[-6:]) < sum(losses[:6])
    plan = json.loads((run / "student" / "plan.json").read_text())
    if case == "smollm3":
        assert config.no_rope_layers == [whole["no_rope_layers"][layer] for layer in plan["layers"]]
    if case == "granite":
        keys = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        assert all(getattr(config, key) == whole[key] != 1 for key in keys)
    if case in MIXED:
        assert config.first_k_dense_replace == (plan["layers"][0] == 0)
        assert (config.n_routed_experts, config.moe_intermediate_size, config.n_shared_experts) == (6, 16, 2)
