"""A run that is asked to stop saves at its next boundary, ends on all ranks, and goes on to the same result."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from compactlm_nemo.parallel import interruption
from compactlm_nemo.parallel.interruption import job_deadline
from tests.chaos.world import World
from tests.support.stopped_runs import logged_steps

LONG = ("distill.steps=400", "distill.checkpoint_every=1000", "search.layers=[4]")
"""Long enough to be met in the middle, without a checkpoint of its own before the end."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stop")


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1), (1, signal.SIGINT)])
def test_a_signal_saves_the_step_that_is_done(root: Path, tmp_path: Path, ranks: int, number: int) -> None:
    world, run = World(root, ranks), tmp_path / "run"
    with world.started(run, *LONG) as running:
        while running.is_alive() and logged_steps(run) < 5:
            time.sleep(0.02)
        running.signal(number, rank=ranks - 1)  # one rank alone is asked
        assert running.wait()
        ended = running.ended()
    assert ended.code == 128 + number, ended.errors
    saved = json.loads((run / "progress" / "distill" / "checkpoints" / "latest.json").read_text())["step"]
    assert 5 <= saved < 400
    lines = [line for line in ended.errors.splitlines() if line.startswith("stopped: ")]
    name = signal.Signals(number).name
    assert len(lines) == 1 and re.match(rf"stopped: distill: {name}: {saved} of 400 steps are saved in {run}", lines[0])
    assert ended.out.count("distill ...") == 1 and "evaluate ..." not in ended.out


@pytest.mark.parametrize("stage", ["score", "cache_teacher"])
def test_a_signal_is_heeded_between_the_parts_of_other_long_stages(root: Path, tmp_path: Path, stage: str) -> None:
    world, run = World(root), tmp_path / "run"
    many = ["score.samples=100", "score.save_every=1"] if stage == "score" else ["distill.teacher=stored"]
    many += ["cache.samples=100", "cache.shard_samples=1"] if stage == "cache_teacher" else []
    with world.started(run, *many) as running:
        while running.is_alive() and not list((run / "progress" / stage).glob("*.safetensors")):
            time.sleep(0.01)
        running.signal(signal.SIGHUP)
        assert running.wait()
        ended = running.ended()
    assert ended.code == 128 + signal.SIGHUP, ended.errors
    assert re.search(rf"stopped: {stage}: SIGHUP: \d+ of \d+ (samples are scored|shards are made)", ended.errors)


def test_a_second_ctrl_c_ends_at_once(root: Path, tmp_path: Path) -> None:
    world, run = World(root), tmp_path / "run"
    with world.started(run, *LONG) as running:
        while running.is_alive() and not (run / "teacher").exists():  # in the middle of a stage without boundaries
            time.sleep(0.01)
        running.signal(signal.SIGINT)
        time.sleep(0.05)
        running.signal(signal.SIGINT)
        assert running.wait(30)
        ended = running.ended()
    assert ended.code == 128 + signal.SIGINT
    assert "interrupted; the same command goes on from here" in ended.errors or "stopped: " in ended.errors


def test_the_end_of_a_job_saves_in_time(root: Path, tmp_path: Path) -> None:
    world, run = World(root), tmp_path / "run"
    ended = world.run(run, *LONG, "run.time_limit=0.5")  # less than the margin: stops at the first boundary
    assert ended.code == 75, ended.errors
    assert "stopped: the job's time is nearly up: import_model is done; the same command goes on." in ended.errors


def test_a_checkpoint_is_made_by_the_clock(root: Path, tmp_path: Path) -> None:
    world, run = World(root), tmp_path / "run"
    settings = ("distill.checkpoint_every=1000", "distill.checkpoint_minutes=1e-5", "distill.stop_after=4")
    ended = world.run(run, *settings, "distill.keep_checkpoints=10")
    folders = [path.name for path in sorted((run / "progress" / "distill" / "checkpoints").glob("step_*"))]
    assert folders == [f"step_{step:07d}" for step in (1, 2, 3, 4)], ended.errors


def test_the_deadline_is_the_setting_or_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert job_deadline(None) is None
    assert job_deadline(10) == pytest.approx(interruption._STARTED + 600)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1800000000")
    assert job_deadline(None) == 1800000000
    assert job_deadline(10) == pytest.approx(interruption._STARTED + 600)


def test_the_margin_grows_with_saves_and_blocks() -> None:
    asked = interruption._Asked()
    assert not asked.is_late()
    asked.deadline = time.time() + 100
    assert not asked.is_late()
    asked.longest_save = 40  # 2 x 40 s and half a minute
    assert asked.is_late()
    asked.longest_save, asked.longest_block = 0, 50
    assert asked.is_late()
