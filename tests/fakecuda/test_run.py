"""Whole runs of all stages at toy size on the device: every stage reads what the others wrote, killed runs go on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from compactlm_nemo.config.load import compose
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.parallel import launch
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.workflow.runner import run_stages
from tests.fakecuda.cluster import cluster, skip_without_fake_cuda
from tests.support.tiny_models import save_tiny
from tests.support.tiny_run import command

skip_without_fake_cuda()

STEPS, BATCH, LENGTH = 2, 2, 16
SMALL = [
    "model.precision=bf16", "score.samples=4", "score.micro_batch=2", "prune.samples=2", f"distill.steps={STEPS}",
    f"distill.global_batch={BATCH}", "distill.checkpoint_every=1", "evaluate.tokens=32",
]  # fmt: skip
TOKENS = STEPS * BATCH * LENGTH
LEAST_SQUARES = ("score.second_moments=true", "prune.reconstruct=least_squares")
RUNS: dict[str, list[str]] = {
    "every_score": [
        "score.width=[l2_mean,var_l2,taylor]", "score.iterations=2", "score.block_lengths=[2]", "score.save_every=2",
        "score.depth=[bi,bi_blocks,lm_loss,logit_mse,logit_mse_iterative,lm_loss_blocks]", "search.latency_ms=1e9",
    ],
    "heads_merged_hidden_losses": [
        "prune.heads=merge", "distill.hidden.layers=[[-2,-1]]", "distill.hidden.embedding=true",
        "correct.while_distilling=true", "correct.steps=2", "data.mask_documents=true",
    ],
    "least_squares": [*LEAST_SQUARES, "prune.by_error=[heads,mlp]", "correct.steps=2"],
    "rotated": [*LEAST_SQUARES, "prune.hidden=rotate", "prune.sequential=true"],
    "stored_top_k": ["distill.teacher=stored", "cache.k=8"],
    "stored_hidden": ["distill.teacher=stored", "cache.kind=hidden"],
    "no_teacher": [
        "distill.teacher=none", "distill.loss.forward_kl=0", "distill.loss.cross_entropy=1", "distill.spike_factor=3",
    ],
    "layers_on_the_students_stream": ["prune.blocks=distill", "prune.block_passes=1"],
    "layers_on_the_teachers_stream": [*LEAST_SQUARES, "prune.blocks=distill", "prune.block_inputs=teacher"],
    "generated_text": [
        "data.train.own.generated=true", "generate.documents=3", "generate.max_tokens=8", "generate.batch=2",
    ],
    "best_weights": ["distill.eval_every=1", "distill.result=best", "distill.recompute=full", "distill.overlap=true"],
}  # fmt: skip
"""Further settings of a run of the tiny Llama of `tests.support.tiny_run`."""
EXPERT_RUNS: dict[str, list[str]] = {
    "experts": ["search.experts=[3]"],
    "experts_least_squares": [*LEAST_SQUARES, "score.expert_moments=true", "search.experts=[3]"],
}


@contextlib.contextmanager
def _launched(layout: ParallelConfig, seed: int, deadline: float | None = None) -> Iterator[Mesh]:
    with cluster(**vars(layout)) as there:
        yield there.mesh


def run(inputs: Path, folder: Path, *overrides: str) -> dict[str, float]:
    """Run all stages in this process, and return the results of `distill`."""
    config = compose(command(inputs, folder, *SMALL, *overrides)[2:])
    with mock.patch.object(launch, "launched", _launched):
        run_stages(config)
    results: dict[str, float] = json.loads((folder / "distill" / "manifest.json").read_text())["results"]
    return results


@pytest.mark.parametrize("name", RUNS)
def test_every_stage_runs_on_the_device(name: str, inputs: Path, tmp_path: Path) -> None:
    assert run(inputs, tmp_path / "run", *RUNS[name])["tokens"] == TOKENS


@pytest.mark.parametrize("name", EXPERT_RUNS)
def test_every_stage_runs_on_the_device_with_experts(name: str, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    (folder / "teacher" / "model.safetensors").unlink()
    save_tiny("qwen2_moe", folder / "teacher", vocab_size=93)
    sizes = ["search.ffn=[16]", "search.hidden=[32]", "search.heads=[2]"]
    assert run(folder, tmp_path / "run", *sizes, *EXPERT_RUNS[name])["tokens"] == TOKENS


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(inputs: Path, tmp_path: Path) -> None:
    parts = ["distill.hidden.layers=[[-1,-1]]", "correct.while_distilling=true", "correct.steps=2"]
    with pytest.raises(ConfigError, match="no finished stage distill"):
        run(inputs, tmp_path / "run", *parts, "distill.stop_after=1")
    assert (tmp_path / "run" / "progress" / "distill" / "checkpoints" / "latest.json").is_file()
    run(inputs, tmp_path / "run", *parts)
    lines = (tmp_path / "run" / "distill" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))
