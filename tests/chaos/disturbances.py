"""The disturbances: kills, signals, second owners, disks that are full or read-only, and damaged files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compactlm_nemo.config.load import CONF
from tests.chaos.damage import DAMAGES, Damage, copied, files_of
from tests.chaos.world import Ended, Tally, World, identity, orphans

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def kills(world: World, count: int, random_: random.Random, longest: float) -> Tally:
    """Kill a rank of a run at a random instant, again and again until it is done; then judge its result.

    One in four is stopped for good instead, as a node that hangs; then all are killed.

    Args:
        longest: Seconds of a start within which the instant lies.
    """
    tally = Tally()
    while tally.tried < count:
        run = _fresh(world, "killed")
        while tally.tried < count:
            rank, stops = random_.randrange(world.ranks), world.ranks > 1 and random_.random() < 0.25
            with world.started(run) as running:
                done = running.wait(random_.uniform(0, longest))
                below = running.children()
                running.signal(signal.SIGSTOP if stops else signal.SIGKILL, rank)
                time.sleep(0.5 if world.ranks > 1 else 0)  # the others meet the loss
                errors = "" if done else running.ended().errors
            if left := orphans(below):
                tally.harm("orphan", f"{len(left)} processes after a kill")
            if done:
                break
            tally.tried += 1
            if "Traceback" in errors and "a fault of this program" in errors:
                tally.harm("traceback", errors[-300:])
        world.judge(run, tally, f"killed, {tally.tried} kills so far")
    return tally


def signals(world: World, count: int, random_: random.Random, longest: float) -> Tally:
    """Send a signal to one rank at a random instant: the run ends with the signal's code, and goes on to equality."""
    tally = Tally()
    for _ in range(count):
        run, number = _fresh(world, "signalled"), random_.choice(SIGNALS)
        with world.started(run) as running:
            done = running.wait(random_.uniform(0, longest))
            running.signal(number, random_.randrange(world.ranks))
            if not running.wait():
                tally.harm("lost", f"{number.name}: no end")
            ended = running.ended()
        tally.tried += 1
        # Before Python itself is up, and once the work is done, the signal's own way is right as well.
        if not done and ended.code not in (0, 128 + number, -number):
            tally.harm("traceback" if ended.has_traceback else "silent", f"{number.name}: {ended}")
        elif ended.has_traceback:
            tally.harm("traceback", f"{number.name}: {ended.errors[-300:]}")
        world.judge(run, tally, f"{number.name}")
    return tally


def second_owners(world: World, count: int) -> Tally:
    """Start a second command on a folder that a first one works in: it is told, and the first is not disturbed."""
    tally = Tally()
    for _ in range(count):
        run = _fresh(world, "owned")
        with world.started(run) as first:
            while first.is_alive() and not (run / "tokens").exists():
                time.sleep(0.05)
            second = world.run(run)
            tally.tried += 1
            if second.code != 2 or "error:" not in second.errors:
                tally.harm("traceback" if second.has_traceback else "silent", f"{second}")
            if not first.wait() or first.ended().code:
                tally.harm("lost", first.ended().errors[-300:])
        world.judge(run, tally, "beside a second owner")
    return tally


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a file system in memory of so many bytes; only root can."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a file system."""
    if os.geteuid() != 0:
        return False
    try:
        with small_disk(folder, 2**20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def full_disks(world: World, count: int, random_: random.Random) -> Tally:
    """Run on a disk that is too small, or that stops taking anything; with room again the run goes on to equality."""
    tally, disk = Tally(), world.root / "disk"
    needed = sum(path.stat().st_size for path in files_of(world.finished))
    for i in range(count):
        closes = i % 3 == 2
        with small_disk(disk, 4 * needed if closes else random_.randrange(2**16, needed)):
            run = disk / "run"
            if closes:
                with world.started(run) as running:
                    running.wait(random_.uniform(1, 5))
                    _close(disk)
                    if not running.wait():
                        tally.harm("lost", "closed disk: no end")
                    ended = running.ended()
            else:
                ended = world.run(run)
            tally.tried += 1
            if not (closes and ended.code == 0):  # that late, the work was done
                judge_refusal(ended, tally, "closed disk" if closes else "full disk", codes=(2, 75))
            assert _remount(disk, f"rw,size={16 * needed}")
            world.judge(run, tally, "after a full disk")
    return tally


def _close(disk: Path) -> None:
    """Let a file system take nothing more: read-only, or without room while a file there is open for writing."""
    if not _remount(disk, "ro"):
        used = shutil.disk_usage(disk).used
        assert _remount(disk, f"size={used}") or _remount(disk, f"size={2 * used}")  # more was written meanwhile


def _remount(disk: Path, how: str) -> bool:
    """Change a file system; whether that was possible."""
    done = subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], capture_output=True)
    return done.returncode == 0


ORDER = ("teacher", "tokens", "score", "search", "student", "distill", "evaluate", "export")
"""Artifacts of a run in the order in which they are made."""


def drawn(files: list[Path], random_: random.Random, numbers: range) -> list[tuple[Path, Damage]]:
    """Return these of all damages of all files, shuffled: equal dice and other numbers give other damages."""
    cases = [(path, damage) for path in files for damage in DAMAGES]
    random_.shuffle(cases)
    return cases[numbers.start : numbers.stop]


def artifact_damages(world: World, numbers: range, random_: random.Random) -> Tally:
    """Damage a file of an artifact and make what follows from it again: it is refused, or not needed at all."""
    tally = Tally()
    files = [path.relative_to(world.finished) for name in ORDER[:-1] for path in files_of(world.finished / name)]
    for path, damage in drawn(files, random_, numbers):
        run = copied(world.finished, world.root / "damaged")
        for later in [*ORDER[ORDER.index(path.parts[0]) + 1 :], "report.md"]:
            shutil.rmtree(run / later) if (run / later).is_dir() else (run / later).unlink(missing_ok=True)
        damage(run / path)
        _judge_damage(world, world.run(run), run, tally, path, damage)
    return tally


def export_damages(world: World, numbers: range, random_: random.Random) -> Tally:
    """Damage a file of a finished export: the next command, or `recipes.verify`, says so."""
    tally = Tally()
    files = [path.relative_to(world.finished) for path in files_of(world.finished / "export")]
    for path, damage in drawn(files, random_, numbers):
        run = copied(world.finished, world.root / "damaged")
        damage(run / path)
        tally.tried += 1
        for recipe in ("verify", *(("compress",) if _shows(damage) else ())):
            judge_refusal(world.run(run, recipe=recipe), tally, f"{recipe}: {path} {damage.__name__}", (2,), path.name)
    return tally


def _shows(damage: Damage) -> bool:
    """Whether a look at names and sizes tells of a damage; `recipes.verify` reads what is inside."""
    return damage.__name__ not in ("flipped", "zeroed")


def progress_damages(world: World, numbers: range, random_: random.Random) -> Tally:
    """Damage a file of a training that was killed: the checkpoint before goes on, or the training is made anew."""
    tally = Tally()
    half = world.root / "half"
    if not (half / "progress").exists():
        shutil.rmtree(half, ignore_errors=True)
        ended = world.run(half, "distill.stop_after=4")
        assert ended.code in (0, 2), ended.errors  # export finds no finished training
    files = [path.relative_to(half) for path in files_of(half / "progress")]
    for path, damage in drawn(files, random_, numbers):
        run = copied(half, world.root / "damaged")
        damage(run / path)
        _judge_damage(world, world.run(run), run, tally, path, damage)
    return tally


def input_damages(world: World, numbers: range, random_: random.Random) -> Tally:
    """Damage a file of the user: a run ends well or in one line. What is whole by its own form is not known damaged."""
    tally = Tally()
    files = [path.relative_to(world.inputs) for path in files_of(world.inputs) if path.parts[-2] != "tasks"]
    for path, damage in drawn(files, random_, numbers):
        inputs = copied(world.inputs, world.root / "damaged_inputs")
        damage(inputs / path)
        run = _fresh(world, "damaged_run")
        ended = world.run(run, "distill.stop_after=1", inputs=inputs)
        tally.tried += 1
        if ended.code not in (0, 2) or ended.has_traceback:
            tally.harm("traceback", f"{path} {damage.__name__}: {ended.errors[-300:]}")
    return tally


def configs(count: int, seed: str) -> Tally:
    """Draw overrides of settings by chance and read them: each ends well or in one line, and soon."""
    test = "tests/config/test_any_value.py::test_any_values_end_well_or_in_an_error_that_names_something"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", test]
    env = os.environ | {"CONFIG_EXAMPLES": str(count)}
    done = subprocess.run(words, cwd=CONF.parent, env=env, capture_output=True, text=True)
    tally = Tally(tried=count)
    if done.returncode != 0:
        tally.harm("traceback", f"configs of seed {seed}: {done.stdout[-600:]}")
    return tally


def _judge_damage(world: World, ended: Ended, run: Path, tally: Tally, path: Path, damage: Damage) -> None:
    """Count harm of a damage: a result that differs without a warning, or an end without a line of error."""
    note = f"{path} {damage.__name__}"
    tally.tried += 1
    if ended.code == 0:
        if identity(run) != world.expected and f"{path.name}: " not in ended.errors:
            tally.harm("silent", note)
    else:
        judge_refusal(ended, tally, note, (2,))


def judge_refusal(ended: Ended, tally: Tally, note: str, codes: tuple[int, ...], word: str = "error: ") -> None:
    """Count harm where a command did not end in one line of error with one of these codes."""
    lines = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    if ended.has_traceback:
        tally.harm("traceback", f"{note}: {ended.errors[-300:]}")
    elif ended.code not in codes or len(lines) != 1 or word not in ended.errors:
        tally.harm("silent", f"{note}: {ended.code} {ended.errors[-300:]!r}")


def _fresh(world: World, name: str) -> Path:
    run = world.root / name
    shutil.rmtree(run, ignore_errors=True)
    return run
