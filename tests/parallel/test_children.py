"""A process that is killed takes along what it has forked, and saving a checkpoint leaves no process behind."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF
from tests.chaos.world import descendants, orphans
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

FORK = """
import multiprocessing, time
from compactlm_nemo.parallel.children import end_children_with_this_process
if {follows}:
    end_children_with_this_process()
multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
time.sleep(60)
"""


@pytest.mark.parametrize("follows", [True, False])
def test_what_a_killed_process_has_forked_ends_with_it(follows: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORK.format(follows=follows)], cwd=CONF.parent)
    end, below = time.monotonic() + 60, set[int]()
    while not below and time.monotonic() < end:
        below = descendants(parent.pid)
        time.sleep(0.02)
    time.sleep(0.2)  # the child has told the kernel
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(below) == 1
    assert orphans(below, seconds=2) == (set() if follows else below)


def _save(rank: int, world: int, folder: Path) -> None:
    from compactlm_nemo.models.checkpoint import save_model
    from tests.chaos.world import descendants

    before = descendants(multiprocessing.current_process().pid or 0)
    _, model = filled(folder / "llama", mesh_of())
    save_model(folder / "saved", model)
    assert descendants(multiprocessing.current_process().pid or 0) == before


def test_a_save_starts_no_process_that_stays(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    run_ranks(_save, 2, tmp_path, tmp_path)
