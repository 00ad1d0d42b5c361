"""A student trains on after its end: `distill.start_from`, the finished training of another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compactlm_nemo.config.data import LossOn
from compactlm_nemo.data.windows import Corpus, Windows
from tests.support import commands
from tests.support.tiny_run import command, metrics

SAMPLES_A_STEP = 4


def more(inputs: Path, run: Path, start: Path, *overrides: str) -> list[str]:
    return command(
        inputs, run, f"run.reuse={start}", f"distill.start_from={start}/distill", "distill.steps=4", *overrides
    )


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of 6 steps and one that trains its student on for 4."""
    folder = tmp_path_factory.mktemp("more")
    first, second = folder / "first", folder / "second"
    for words in (command(inputs, first), more(inputs, second, first)):
        result = commands.run(words)
        assert result.returncode == 0, result.stderr
    assert "prune: done before in" in result.stdout  # of the first run, not made again
    return first, second


def test_the_first_loss_is_that_of_the_trained_student_on_the_samples_that_follow(inputs, runs) -> None:
    """KL of both exported folders by transformers in float64, on samples 24 to 27 of the training order."""
    first, second = runs
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder).double()
        for folder in (inputs / "teacher", first / "export" / "hf")
    )
    windows = Windows([Corpus(first / "tokens" / "train.a", 1.0, LossOn.answer, None)], 16, seed=1234)
    tokens = torch.stack([windows.sample(6 * SAMPLES_A_STEP + i) for i in range(SAMPLES_A_STEP)])[:, :-1]
    with torch.no_grad():
        log_p, log_q = (model(tokens).logits.log_softmax(-1) for model in (teacher, student))
    want = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    got = metrics(second)[0]["train/kd_forward_kl"]
    assert got == pytest.approx(want, rel=1e-5)


def test_tokens_of_both_trainings_are_counted(runs) -> None:
    first, second = runs
    tokens = [json.loads((run / "distill" / "manifest.json").read_text())["results"]["tokens"] for run in runs]
    assert tokens == [6 * SAMPLES_A_STEP * 16, 10 * SAMPLES_A_STEP * 16]


def test_a_training_that_goes_on_survives_a_stop(inputs: Path, runs, tmp_path: Path) -> None:
    first, second = runs
    run = tmp_path / "stopped"
    for overrides in (["distill.stop_after=3"], []):
        result = commands.run(more(inputs, run, first, *overrides))
    assert result.returncode == 0, result.stderr
    want, got = (load_file(each / "export" / "hf" / "model.safetensors") for each in (second, run))
    assert want.keys() == got.keys()
    for name, weight in want.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=0)
    assert metrics(run) == metrics(second)


def test_it_is_skipped_until_the_training_that_it_begins_with_is_another(inputs: Path, runs, tmp_path: Path) -> None:
    first, second = runs
    result = commands.run(more(inputs, second, first))
    assert "distill: done before, skipped" in result.stdout
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    result = commands.run(more(inputs, second, first, f"distill.start_from={moved}/distill"))
    assert result.returncode == 0 and "distill: done before, skipped" in result.stdout  # where it lies is all the same
    other = tmp_path / "other"
    shutil.copytree(second, other)
    result = commands.run(more(inputs, second, first, f"distill.start_from={other}/distill"))
    assert result.returncode == 2 and "differs: input distill.start_from" in result.stderr


def test_what_cannot_train_on_is_told_before_anything_runs(inputs: Path, runs, tmp_path: Path) -> None:
    first, _ = runs
    new = tmp_path / "new"

    def told(*overrides: str, run: Path = new) -> str:
        result = commands.run(more(inputs, run, first, *overrides))
        assert result.returncode == 2 and result.stderr.startswith("error: "), result.stderr
        assert not new.exists()
        return result.stderr

    assert "holds no finished training" in told("distill.start_from=/nowhere")
    assert "holds another stage" in told(f"distill.start_from={first}/student")
    assert "is of this run itself" in told(run=first)
    assert "targets are not stored" in told("distill.teacher=stored", "cache.samples=100")
    assert "student of another shape" in told("search.ffn=[48]")


def test_a_damaged_training_is_not_gone_on_from(inputs: Path, runs, tmp_path: Path) -> None:
    first, _ = runs
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    [weights, *_] = sorted((copy / "distill").rglob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    result = commands.run(more(inputs, tmp_path / "run", first, f"distill.start_from={copy}/distill"))
    assert result.returncode == 2 and weights.name in result.stderr
