"""What must hold on every node before a job of many nodes computes anything: found in a minute, not after hours.

The command line is that of the recipe that follows.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from compactlm_nemo.artifacts import atomic_write_text, git_commit, package_versions
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError, listed
from compactlm_nemo.parallel.world import is_main_rank, launch_rank, launch_world_size
from compactlm_nemo.workflow.layout_checks import launch_problems

MOST_CLOCK_SECONDS = 10.0
"""Difference of the nodes' clocks: with more, times in logs and the end of a job mean little."""


FEWEST_FREE_BYTES = 2**30
"""Space in `run.dir` below which no stage could write anything."""


TOKEN = ".check_nodes"
"""How the file in `run.dir` begins that all ranks look for; each launch has its own, as tasks of an array share one."""


@dataclass(frozen=True)
class Node:
    """What one rank sees."""

    rank: int
    host: str
    ranks: int
    """Ranks of its node."""
    gpus: int | None
    """GPUs that this process sees; None without CUDA in torch."""
    versions: dict[str, str | None]
    """Of packages, Python and the code."""
    sees_run_dir: bool
    """Whether what the main rank wrote into `run.dir` is there."""
    free_bytes: int
    """In `run.dir`."""
    clock: float
    """Seconds since the epoch, read by all ranks at one moment."""


def check_nodes(config: Config) -> None:
    """Start all ranks, sum over them, and compare what they see."""
    if config.dry_run:
        return
    if problems := launch_problems(config, launch_world_size()):
        raise ConfigError(problems)
    from compactlm_nemo.parallel.collectives import all_gather_objects
    from compactlm_nemo.parallel.launch import launched

    start = time.monotonic()
    with launched(config.parallel, config.run.seed):
        nodes = all_gather_objects(_look(Path(config.run.dir)))
    if differing := node_problems(nodes):
        raise ConfigError(listed(differing))
    if is_main_rank():
        hosts = len({node.host for node in nodes})
        free = min(node.free_bytes for node in nodes) / 2**30
        print(f"{len(nodes)} ranks on {hosts} nodes are alike; {free:.0f} GiB free; {time.monotonic() - start:.0f} s")


def _look(folder: Path) -> Node:
    """Sum over all ranks on their devices, and return what this one sees."""
    import platform

    import torch

    from compactlm_nemo.parallel.collectives import barrier, broadcast_object, world_sum
    from compactlm_nemo.parallel.devices import device
    from compactlm_nemo.parallel.launch import main_rank_writes

    total = world_sum(torch.tensor([launch_rank() + 1.0], device=device())).item()
    expected = launch_world_size() * (launch_world_size() + 1) / 2
    if total != expected:
        raise ConfigError(f"the sum over all ranks is {total}, not {expected}; look at the network of these nodes.")
    token = folder / f"{TOKEN}-{broadcast_object(uuid4().hex)}"
    with main_rank_writes() as writes:
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(token, "")
    sees = token.is_file()
    barrier()
    clock = time.time()
    if is_main_rank():
        token.unlink()
    return Node(
        rank=launch_rank(),
        host=socket.gethostname(),
        ranks=int(os.environ.get("LOCAL_WORLD_SIZE", launch_world_size())),
        gpus=torch.cuda.device_count() if torch.version.cuda else None,
        versions=package_versions() | {"Python": platform.python_version(), "the code": git_commit()},
        sees_run_dir=sees,
        free_bytes=shutil.disk_usage(folder if folder.is_dir() else Path.cwd()).free,
        clock=clock,
    )


def node_problems(nodes: list[Node]) -> list[str]:
    """Return what keeps these ranks from working together, a line each."""
    main, problems = nodes[0], []
    for node in {node.host: node for node in nodes}.values():
        if node.gpus is not None and node.gpus < node.ranks:
            problems.append(
                f"host {node.host} has {node.gpus} GPUs for {node.ranks} ranks; set GPUS_PER_NODE, or drain the host."
            )
        differing = [name for name in main.versions if node.versions.get(name) != main.versions[name]]
        problems += [
            f"{name} is {node.versions.get(name)} on host {node.host}, {main.versions[name]} on host {main.host}; "
            "install one."
            for name in differing
        ]
        if not node.sees_run_dir:
            problems.append(
                f"host {node.host} does not see run.dir of host {main.host}; choose one that all nodes share."
            )
        elif node.free_bytes < FEWEST_FREE_BYTES:
            problems.append(f"run.dir has {node.free_bytes / 2**20:.0f} MiB free on host {node.host}; make room.")
        if abs(node.clock - main.clock) > MOST_CLOCK_SECONDS:
            problems.append(
                f"the clock of host {node.host} is {node.clock - main.clock:+.0f} s off that of {main.host}; set it."
            )
    return problems
