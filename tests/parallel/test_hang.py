"""A rank that stalls is named, with its host and place, and every rank ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF

RANK = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from compactlm_nemo.parallel import hang
from compactlm_nemo.parallel.collectives import all_gather_objects

def sleeps_for_ever():
    time.sleep(600)

hang.GRACE_SECONDS = 1.0
rank, folder, how = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
with hang.watched(Path(folder), float(sys.argv[3]), all_gather_objects(f"host{rank}")):
    for step in range(4):
        hang.beat(f"after step {step}")
        if rank == 1 and step == 2:
            if how == "sleeps":
                sleeps_for_ever()
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
dist.destroy_process_group()  # gloo's threads that still run when the interpreter ends abort the process
print("done")
"""


def start(folder: Path, how: str, minutes: float) -> list[subprocess.Popen[str]]:
    env = {"PATH": "/usr/bin:/bin", "WORLD_SIZE": "2", "PYTHONPATH": str(CONF.parent)}
    words = [sys.executable, "-c", RANK, str(folder), how, str(minutes)]
    return [
        subprocess.Popen(
            words, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("sleeps", "rank 1 on host1 is in after step 2 <string>:9 sleeps_for_ever"),
        ("stopped", "rank 1 on host1 gives no sign of life"),
    ],
)
def test_a_rank_that_stalls_is_named_and_all_end(tmp_path: Path, how: str, named: str) -> None:
    ranks = start(tmp_path, how, minutes=0.05)
    _, errors = ranks[0].communicate(timeout=120)
    assert ranks[0].returncode == 75
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert named in line and "rank 0" not in line and f"{tmp_path}/faults" in line
    assert "all_reduce" in (tmp_path / "faults" / "hang-rank0.txt").read_text()
    if how == "sleeps":
        ranks[1].communicate(timeout=60)
        assert ranks[1].returncode == 75
        assert "sleeps_for_ever" in (tmp_path / "faults" / "hang-rank1.txt").read_text()
    ranks[1].kill()
    ranks[1].communicate()


def test_ranks_that_go_on_are_left_alone(tmp_path: Path) -> None:
    for rank in start(tmp_path, "works", minutes=5):
        out, errors = rank.communicate(timeout=120)
        assert (rank.returncode, out) == (0, "done\n"), errors
    assert not (tmp_path / "faults").exists()
