"""Ranks that differ are told apart before a job computes: GPUs, versions, code, run.dir, disk and clocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compactlm_nemo.workflow.check_nodes import Node, node_problems
from tests.support import commands
from tests.support.tiny_run import command

VERSIONS = {"torch": "2.13.0", "the code": "abc"}
MAIN = Node(rank=0, host="n1", ranks=8, gpus=8, versions=dict(VERSIONS), sees_run_dir=True, free_bytes=2**40, clock=1e9)


def test_two_ranks_that_are_alike_pass_and_leave_nothing_behind(inputs: Path, tmp_path: Path) -> None:
    done = commands.run(command(inputs, tmp_path / "run", "parallel.tp=2", recipe="check_nodes"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ranks on 1 nodes are alike;")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_launch_of_another_size_is_refused(inputs: Path, tmp_path: Path) -> None:
    done = commands.run(command(inputs, tmp_path / "run", "parallel.tp=2", recipe="check_nodes"))
    assert done.returncode == 2 and "parallel.tp=2" in done.stderr


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"gpus": 7}, "host n2 has 7 GPUs for 8 ranks"),
        ({"versions": VERSIONS | {"torch": "2.12.0"}}, "torch is 2.12.0 on host n2, 2.13.0 on host n1"),
        ({"versions": VERSIONS | {"the code": "def"}}, "the code is def on host n2, abc on host n1"),
        ({"sees_run_dir": False}, "host n2 does not see run.dir of host n1"),
        ({"free_bytes": 2**20}, "run.dir has 1 MiB free on host n2"),
        ({"clock": 1e9 - 3600}, "the clock of host n2 is -3600 s off that of n1"),
    ],
)
def test_what_differs_on_a_host_is_named_once(other: dict[str, Any], told: str) -> None:
    nodes = [MAIN, replace(MAIN, rank=1), *(replace(MAIN, rank=rank, host="n2", **other) for rank in (2, 3))]
    (problem,) = node_problems(nodes)
    assert told in problem


def test_ranks_without_cuda_need_no_gpus() -> None:
    assert node_problems([replace(MAIN, gpus=None), replace(MAIN, rank=1, host="n2", gpus=None, clock=1e9 + 5)]) == []
