"""A tiny run that is done again and again under disturbances, and what counts as harm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from compactlm_nemo.artifacts import file_sha256
from tests.support import commands
from tests.support.tiny_run import command, make_inputs, metrics

SHORT = (
    "distill.checkpoint_every=1", "distill.checkpoint_async=true", "score.save_every=2", "cache.shard_samples=4",
)  # fmt: skip
"""Settings that give a tiny run many places to go on from."""

PATIENCE_SECONDS = 240
"""Longest wait for a command on a machine that does other work."""

LAUNCHER_SECONDS = 30
"""As torchrun gives the other ranks after one has failed."""


@dataclass
class Tally:
    """Counts of one kind of disturbance."""

    tried: int = 0
    harms: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def harm(self, kind: str, note: str) -> None:
        """Count a harm: lost, unequal, silent, traceback or orphan."""
        self.harms[kind] += 1
        self.notes.append(f"{kind}: {note}")

    def add(self, other: Tally) -> None:
        """Count what another tally has counted."""
        self.tried += other.tried
        self.harms += other.harms
        self.notes += other.notes


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    errors: str

    @staticmethod
    def of(done: subprocess.CompletedProcess[str]) -> Ended:
        """Return the same of a completed process."""
        return Ended(done.returncode, done.stdout, done.stderr)

    @property
    def has_traceback(self) -> bool:
        return "Traceback" in self.errors or "a fault of this program" in self.errors


@dataclass
class World:
    """Inputs, and the result of an undisturbed run on so many ranks, by whose weights and metrics others are judged."""

    root: Path
    ranks: int = 1

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.inputs = make_inputs(self.root / "inputs") if not self.has_inputs() else self.root / "inputs"
        self.finished = self.root / f"finished_{self.ranks}"
        if not (self.finished / "report.md").exists():
            shutil.rmtree(self.finished, ignore_errors=True)
            ended = self.run(self.finished)
            assert ended.code == 0, ended.errors
        self.expected = identity(self.finished)

    def has_inputs(self) -> bool:
        return (self.root / "inputs" / "task.json").exists()

    def words(self, run: Path, *overrides: str, inputs: Path | None = None, recipe: str = "compress") -> list[str]:
        """Arguments of a command of this run."""
        if recipe == "verify":
            return ["-m", "recipes.verify", f"run.dir={run}"]
        return command(inputs or self.inputs, run, *SHORT, *overrides, recipe=recipe)

    def run(self, run: Path, *overrides: str, inputs: Path | None = None, recipe: str = "compress") -> Ended:
        """Run a command to its end."""
        words = self.words(run, *overrides, inputs=inputs, recipe=recipe)
        return Ended.of(commands.run(words, timeout=PATIENCE_SECONDS, ranks=self.ranks))

    @contextmanager
    def started(self, run: Path, *overrides: str) -> Iterator[Started]:
        """Start a command on all ranks, and leave no process of it behind."""
        running = Started(self, run, overrides)
        try:
            yield running
        finally:
            running.kill()

    def judge(self, run: Path, tally: Tally, note: str) -> None:
        """Finish a disturbed run, and count what differs from the undisturbed one."""
        ended = self.run(run)
        if ended.code != 0:
            tally.harm("traceback" if ended.has_traceback else "lost", f"{note}: {ended.errors[-300:]}")
        elif identity(run) != self.expected:
            tally.harm("unequal", note)


class Started:
    """The processes of a command that runs."""

    def __init__(self, world: World, run: Path, overrides: tuple[str, ...]) -> None:
        self.folder = run.with_name(run.name + ".output")
        self.folder.mkdir(exist_ok=True)
        self.words = world.words(run, *overrides)
        self.processes = commands.start_ranks(self.words, self.folder, world.ranks)

    def is_alive(self) -> bool:
        """Whether any rank runs."""
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one rank, if it runs."""
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid or 0, number)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> bool:
        """Wait for the end of all ranks; False when that takes longer.

        As a launcher does, end those that are left when one has failed: before the ranks have met, they cannot know.
        """
        end, failed_at = time.monotonic() + seconds, None
        while self.is_alive() and time.monotonic() < end:
            if failed_at is None and any(process.exitcode for process in self.processes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + LAUNCHER_SECONDS:
                self.kill()
            time.sleep(0.05)
        return not self.is_alive()

    def children(self) -> set[int]:
        """Return the processes that the ranks have started, and those that these have."""
        return set().union(*(descendants(process.pid or 0) for process in self.processes))

    def kill(self) -> None:
        """End all ranks at once."""
        for process in self.processes:
            process.kill()
            process.join()

    def ended(self) -> Ended:
        """Return how all ranks ended, once they have."""
        return Ended.of(commands.ended(self.processes, self.words, self.folder))


def identity(run: Path) -> dict[str, object]:
    """Return what two runs have in common when they are equal: exported weights, and the metrics of each step."""
    weights = {path.name: file_sha256(path) for path in sorted((run / "export").rglob("*.safetensors"))}
    assert weights, f"{run} has no export"
    return {"weights": weights, "metrics": json.dumps(metrics(run))}


def descendants(pid: int) -> set[int]:
    """Return the processes below one, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(entry)) is not None:
            parents.setdefault(stat[1], []).append(int(entry.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found.update(children)
        waiting += children
    return found


def orphans(pids: set[int], seconds: float = 10) -> set[int]:
    """Return those of the processes that are still alive after so long; a zombie is not."""
    end = time.monotonic() + seconds
    while (alive := {pid for pid in pids if _is_alive(pid)}) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return alive


def _is_alive(pid: int) -> bool:
    stat = _stat(Path("/proc") / str(pid))
    return stat is not None and stat[0] not in "ZX"


def _stat(entry: Path) -> tuple[str, int] | None:
    """Return state and parent of a process, None when it is gone."""
    try:
        words = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return words[0], int(words[1])
