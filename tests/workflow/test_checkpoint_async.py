"""Runs that end while a checkpoint is being written beside the steps go on to the result of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from compactlm_nemo.artifacts import HASHES
from tests.chaos.world import Started, World, identity, orphans


class SlowSaves(World):
    """A world whose checkpoints take many steps to write."""

    def words(self, run: Path, *overrides: str, inputs: Path | None = None, recipe: str = "compress") -> list[str]:
        _, _, *rest = super().words(run, *overrides, "distill.checkpoint_every=2", inputs=inputs, recipe=recipe)
        return ["-m", "tests.support.slow_saves", *rest]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("async")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_waits_for_its_checkpoints_has_the_same_result(root: Path, tmp_path: Path, ranks: int) -> None:
    world = World(root, ranks)
    ended = world.run(tmp_path / "run", "distill.checkpoint_async=false")
    assert ended.code == 0, ended.errors
    assert identity(tmp_path / "run") == world.expected
    for run in (tmp_path / "run", world.finished):
        results = json.loads((run / "distill" / "manifest.json").read_text())["results"]
        assert 0 < results["saving_seconds"] < results["training_seconds"]
        assert "saving held up training for" in (run / "report" / "report.md").read_text()


def checkpoints(run: Path) -> Path:
    return run / "progress" / "distill" / "checkpoints"


def pending(run: Path) -> list[Path]:
    """Folders of checkpoints that are not complete."""
    return [path for path in checkpoints(run).glob("step_*") if not (path / HASHES).exists()]


def wait_for(running: Started, is_there: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while running.is_alive() and not is_there() and time.monotonic() < end:
        time.sleep(0.01)


def _is_other(run: Path, first: list[Path]) -> bool:
    """Whether another checkpoint is being written than before."""
    return bool(found := pending(run)) and found != first


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_while_a_checkpoint_is_written_loses_no_earlier_one(root: Path, tmp_path: Path, ranks: int) -> None:
    """Again and again, until the run is done: every other kill meets the second checkpoint of a process."""
    world, run, dice, newest = SlowSaves(root, ranks), tmp_path / "run", random.Random(ranks), 0
    for kill in range(4):
        with world.started(run) as running:
            wait_for(running, lambda: pending(run))
            if kill % 2:
                wait_for(running, partial(_is_other, run, pending(run)))
            time.sleep(dice.uniform(0, 0.8))
            below = running.children()
            assert not (running.is_alive() and below), "a save has started a process"
            running.signal(signal.SIGKILL, rank=dice.randrange(ranks))
            time.sleep(0.2)
        assert not orphans(below)
        latest = checkpoints(run) / "latest.json"
        step = json.loads(latest.read_text())["step"] if latest.exists() else 0
        assert step >= newest
        newest = step
    assert newest >= 2
    ended = world.run(run)
    assert ended.code == 0, ended.errors
    assert identity(run) == world.expected


def test_a_signal_while_a_checkpoint_is_written_saves_the_step_that_is_done(root: Path, tmp_path: Path) -> None:
    world, run = SlowSaves(root), tmp_path / "run"
    with world.started(run, "distill.keep_checkpoints=9") as running:
        wait_for(running, lambda: pending(run))
        running.signal(signal.SIGTERM)
        assert running.wait()
        ended = running.ended()
    assert ended.code == 128 + signal.SIGTERM and "steps are saved in" in ended.errors, ended.errors
    saved = json.loads((checkpoints(run) / "latest.json").read_text())["step"]
    whole = sorted(checkpoints(run).glob(f"step_*/{HASHES}"))
    assert saved > 2 and [path.parent.name for path in whole] == ["step_0000002", f"step_{saved:07d}"]
    assert not pending(run)
    ended = world.run(run)
    assert ended.code == 0, ended.errors
    assert identity(run) == world.expected
