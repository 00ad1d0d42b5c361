"""A teacher that is trained on the distillation's tokens before it teaches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from compactlm_nemo.config.teacher import CorrectConfig
from compactlm_nemo.errors import ConfigError
from tests.support import commands
from tests.support.tiny_run import command, metrics

CORRECT = ["correct.steps=4", "correct.lr=1e-2", "distill.checkpoint_every=2"]


def _run(words: list[str], ranks: int = 1) -> None:
    done = commands.run(words, ranks=ranks)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def plain(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "plain"
    _run(command(inputs, run))
    return run


def test_the_corrected_teacher_teaches(inputs: Path, plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _run(command(inputs, run, *CORRECT))  # the whole run, with the stage in its place
    correction, before, after = metrics(run, "corrected"), metrics(plain), metrics(run)
    # Both begin with the same batch, which the teacher has not been trained on.
    assert correction[0]["train/loss"] == pytest.approx(before[0]["train/teacher_lm_loss_nats"], rel=1e-5)
    assert "train/teacher_lm_loss_nats" not in correction[0]
    assert [line["step"] for line in correction] == list(range(4))
    assert [line["train/lr"] for line in correction] == pytest.approx([5e-3, 1e-2, 5e-3, 0])  # two of warm-up, cosine
    assert after[0]["train/teacher_lm_loss_nats"] < before[0]["train/teacher_lm_loss_nats"] - 0.05
    scores = [load_file(folder / "score" / "scores.safetensors") for folder in (plain, run)]
    assert all(value.equal(scores[1][name]) for name, value in scores[0].items())  # the cut is the original's

    stored = shutil.copytree(run, tmp_path / "stored")
    for folder in ("distill", "progress/distill"):
        shutil.rmtree(stored / folder)
    words = [*CORRECT, "distill.teacher=stored", "cache.kind=hidden"]
    for recipe in ("cache_teacher", "distill"):
        _run(command(inputs, stored, *words, recipe=recipe))
    for a, b in zip(after, metrics(stored), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4)
    metadata = json.loads((stored / "targets" / "targets.json").read_text())
    assert metadata["model"] == json.loads((run / "corrected" / "manifest.json").read_text())["fingerprint"]


def test_two_ranks_correct_as_one(inputs: Path, plain: Path, tmp_path: Path) -> None:
    runs = []
    for ranks, layout in ((1, []), (2, ["parallel.pp=2"])):
        run = tmp_path / str(ranks)
        for stage in ("teacher", "tokens"):
            shutil.copytree(plain / stage, run / stage)
        _run(command(inputs, run, *CORRECT, *layout, recipe="correct_teacher"), ranks)
        runs.append(metrics(run, "corrected"))
    for one, two in zip(*runs, strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
        assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3)


WHILE_DISTILLING = [*CORRECT, "correct.while_distilling=true"]


def _pruned(plain: Path, run: Path) -> Path:
    for stage in ("teacher", "tokens", "score", "search", "student"):
        shutil.copytree(plain / stage, run / stage)
    return run


def test_a_teacher_corrected_while_distilling_learns_what_it_has_taught(
    inputs: Path, plain: Path, tmp_path: Path
) -> None:
    """Each batch is taught by the weights that training on the batches before has made, as in a stage of its own."""
    before = _pruned(plain, tmp_path / "before")
    _run(command(inputs, before, *CORRECT, recipe="correct_teacher"))
    alone = metrics(before, "corrected")
    run = _pruned(plain, tmp_path / "while_distilling")
    _run(command(inputs, run, *WHILE_DISTILLING, recipe="distill"))
    got = metrics(run)
    assert len(got) == 6
    for line, wanted in zip(got, alone, strict=False):
        assert line["train/correct_loss"] == pytest.approx(wanted["train/loss"], rel=1e-6)
        assert line["train/correct_lr"] == wanted["train/lr"]
        assert line["train/teacher_lm_loss_nats"] == pytest.approx(line["train/correct_loss"], rel=1e-6)
    assert "train/correct_loss" not in got[4]  # four steps of six

    stopped = _pruned(plain, tmp_path / "stopped")
    for more in (["distill.stop_after=3"], []):
        _run(command(inputs, stopped, *WHILE_DISTILLING, *more, recipe="distill"))
    assert metrics(stopped) == got

    staged = _pruned(plain, tmp_path / "staged")
    _run(command(inputs, staged, *WHILE_DISTILLING, "parallel.pp=2", "distill.recompute=full", recipe="distill"), 2)
    for one, two in zip(got, metrics(staged), strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3)
        assert two["train/teacher_lm_loss_nats"] == pytest.approx(one["train/teacher_lm_loss_nats"], rel=1e-4)


def test_what_is_missing_is_named(inputs: Path, plain: Path, tmp_path: Path) -> None:
    run = shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(run / "distill")
    done = commands.run(command(inputs, run, *CORRECT, recipe="distill"))
    assert done.returncode == 2 and "no finished stage correct_teacher" in done.stderr
    done = commands.run(command(inputs, run, recipe="correct_teacher"))
    assert done.returncode == 2 and "correct.steps=0 trains no teacher" in done.stderr
    done = commands.run(command(inputs, run, *WHILE_DISTILLING, recipe="correct_teacher"))
    assert done.returncode == 2 and "correct.while_distilling=true trains the teacher in recipes.distill" in done.stderr
    settings = {"steps": -1, "lr": 0, "min_lr": 1, "warmup_steps": -1}
    for name, value in settings.items():
        with pytest.raises(ConfigError, match=rf"correct\.{name}={value}"):
            CorrectConfig(**{name: value})
