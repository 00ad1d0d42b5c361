"""A model with experts through the whole main job: scored, refitted, cut, taught and loaded in transformers."""

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

SHAPE = ["search.ffn=[16]", "search.experts=[3]", "search.shared_expert_ffn=[24]", "search.layers=[3]"]


REFIT = ["score.second_moments=true", "score.expert_moments=true", "prune.reconstruct=least_squares"]


@pytest.fixture(scope="module")
def teacher(inputs: Path) -> Path:
    """A tiny Qwen2-MoE with the tokenizer of the inputs."""
    folder = inputs / "experts"
    save_tiny("qwen2_moe", folder, vocab_size=93, eos_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(inputs / "teacher" / name, folder)
    return folder


def test_experts_are_refitted_cut_and_taught(inputs: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    heads = ["search.heads=[]", "search.hidden=[]"]
    done = commands.run(command(inputs, run, f"model.source={teacher}", *SHAPE, *heads, *REFIT))
    assert done.returncode == 0, done.stderr
    student = AutoModelForCausalLM.from_pretrained(run / "export" / "hf")
    config = student.config
    assert (config.num_experts, config.moe_intermediate_size, config.shared_expert_intermediate_size) == (3, 16, 24)
    assert all(torch.isfinite(x).all() for x in student.parameters())
    assert metrics(run)[-1]["train/loss"] < metrics(run)[0]["train/loss"]


def test_a_gpt_oss_is_refitted_cut_and_taught(inputs: Path, tmp_path: Path) -> None:
    """In every axis; its local and global layers keep their kind, and the tensors of all experts hold three."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    save_tiny("gpt_oss", teacher, vocab_size=93, eos_token_id=0, bos_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(inputs / "teacher" / name, teacher)
    shape = [setting for setting in SHAPE if "shared" not in setting] + ["search.heads=[2]", "search.groups=[1]"]
    settings = [*shape, "search.hidden=[24]", "distill.steps=24", *REFIT]
    done = commands.run(command(inputs, run, f"model.source={teacher}", *settings))
    assert done.returncode == 0, done.stderr
    student, info = AutoModelForCausalLM.from_pretrained(run / "export" / "hf", **EAGER, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    config = student.config
    assert (config.num_local_experts, config.intermediate_size, config.hidden_size) == (3, 16, 24)
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (2, 1, 3)
    assert student.model.layers[0].mlp.experts.gate_up_proj.shape == (3, 24, 32)
    assert student.model.layers[0].self_attn.sinks.shape == (2,)
    plan = json.loads((run / "student" / "plan.json").read_text())
    kinds = ("sliding_attention", "full_attention")
    assert config.layer_types == [kinds[layer % 2] for layer in plan["layers"]]
    assert all(torch.isfinite(x).all() for x in student.parameters())
    losses = [values["train/loss"] for values in metrics(run)]
    assert sum(losses[-6:]) < sum(losses[:6])


def test_a_refit_without_the_experts_moments_is_refused_before_anything_runs(
    inputs: Path, teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = [setting for setting in REFIT if "expert" not in setting]
    done = commands.run(command(inputs, run, f"model.source={teacher}", *SHAPE, *settings))
    assert done.returncode == 2
    assert "needs score.expert_moments=true" in done.stderr
    assert not run.exists()
