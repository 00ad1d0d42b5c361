"""Runs a test function on several gloo processes."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.commands import PRELOAD

# Every rank of every test starts from the fork server that commands start from too.
multiprocessing.set_forkserver_preload(PRELOAD)


def run_ranks(
    fn: Callable[..., None], world: int, tmp_path: Path, *args: Any, start_method: str = "forkserver"
) -> None:  # fmt: skip
    """Call `fn(rank, world, *args)` in `world` processes that form a gloo group; the first failure is raised here.

    `fn` must be a module-level function. The ranks meet in a new file of `tmp_path`, so no port is taken.

    Args:
        start_method: "spawn" where the environment must hold from the start of the processes: a fork server may be
            there already, from another test.
    """
    store = tmp_path / f"store-{uuid.uuid4().hex}"
    mp.start_processes(_rank, args=(fn, world, store, args), nprocs=world, start_method=start_method)


def _rank(rank: int, fn: Callable[..., None], world: int, store: Path, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(minutes=3)
    )
    fn(rank, world, *args)
    dist.destroy_process_group()
