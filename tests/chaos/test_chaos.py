"""A small part of `python -m tests.chaos`, and that it sees harm where there is some."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import disturbances
from tests.chaos.__main__ import Kind, tried
from tests.chaos.damage import DAMAGES, copied
from tests.chaos.world import Ended, Tally, World, descendants, orphans


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def world(root: Path) -> World:
    return World(root)


def test_a_run_that_is_killed_goes_on_to_the_same_result(world: World) -> None:
    assert_no_harm(disturbances.kills(world, 5, random.Random(1), longest=6))


def test_a_run_of_two_ranks_of_which_one_is_killed_goes_on_to_the_same_result(root: Path) -> None:
    assert_no_harm(disturbances.kills(World(root, 2), 3, random.Random(1), longest=8))


def test_a_full_disk_loses_nothing(world: World, tmp_path: Path) -> None:
    if not disturbances.can_mount(tmp_path / "disk"):
        pytest.skip("only root can mount a small disk")
    assert_no_harm(disturbances.full_disks(world, 3, random.Random(1)))


def test_a_damaged_input_is_refused_in_one_line(world: World) -> None:
    assert_no_harm(disturbances.input_damages(world, range(6), random.Random(1)))


def test_a_damaged_artifact_is_refused_where_it_is_needed(world: World) -> None:
    assert_no_harm(disturbances.artifact_damages(world, range(8), random.Random(1)))


def test_a_damaged_export_is_not_skipped(world: World) -> None:
    assert_no_harm(disturbances.export_damages(world, range(4), random.Random(1)))


def test_damaged_progress_gives_way_to_what_was_before_it(world: World) -> None:
    assert_no_harm(disturbances.progress_damages(world, range(6), random.Random(1)))


def test_harm_is_seen(world: World, tmp_path: Path) -> None:
    """Each kind of harm, made on purpose, is counted."""
    tally = Tally()
    run = copied(world.finished, tmp_path / "run")
    world.judge(run, tally, "nothing was done to it")
    assert not tally.harms
    (weights,) = (run / "export").rglob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    world.judge(run, tally, "another bit")
    assert tally.harms["unequal"] + tally.harms["lost"] == 1

    said = {
        "traceback": Ended(1, "", "error: KeyError: 'x': a fault of this program"),
        "silent": Ended(0, "", ""),
        "no": Ended(2, "", "a log: an error: no\nerror: this and that"),
    }
    for kind, ended in said.items():
        tally = Tally()
        disturbances.judge_refusal(ended, tally, "made up", (2,))
        assert dict(tally.harms) == ({} if kind == "no" else {kind: 1})


def test_what_was_tried_is_not_tried_again_and_counts(tmp_path: Path) -> None:
    """A stopped command goes on in its folder; another seed begins anew."""
    calls: list[range] = []

    def attempt(numbers: range) -> Tally:
        if len(calls) == 2 and numbers.start == 4:
            raise KeyboardInterrupt
        calls.append(numbers)
        tally = Tally(tried=len(numbers))
        tally.harm("lost", f"{numbers.start}")
        return tally

    kind = Kind(5, 2, attempt)
    with pytest.raises(KeyboardInterrupt):
        tried(tmp_path, "made up", kind, 1.0, seed=0)
    assert calls == [range(0, 2), range(2, 4)]
    calls.append(range(0))
    tally, seconds = tried(tmp_path, "made up", kind, 1.0, seed=0)
    assert calls[3:] == [range(4, 5)] and seconds > 0
    assert (tally.tried, tally.harms, tally.notes) == (5, {"lost": 3}, ["lost: 0", "lost: 2", "lost: 4"])
    assert tried(tmp_path, "made up", kind, 0.4, seed=1)[0].tried == 2 and calls[4:] == [range(0, 2)]


def test_damages_of_later_pieces_are_others(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    pieces = [disturbances.drawn(files, random.Random(0), range(first, first + 8)) for first in (0, 8, 16)]
    assert len({case for piece in pieces for case in piece}) == 24 == len(files) * len(DAMAGES)


def test_processes_that_outlive_their_parent_are_seen() -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '600']); input()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    below: set[int] = set()
    while not below:
        below = descendants(parent.pid)
    parent.kill()
    parent.wait()
    assert orphans(below, seconds=0.2) == below  # and ended
    assert orphans(below, seconds=5) == set()


def assert_no_harm(tally: Tally) -> None:
    assert tally.tried > 0
    assert not tally.harms, "\n".join(tally.notes)
