"""Simulations side by side: each takes a core for seconds, and none needs another's result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any, TypeVar

R = TypeVar("R")

MOST_WORKERS = 16
"""More would start longer than they work."""
_OTHER_RANKS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def start(function: Callable[..., R], *arguments: Any) -> Future[R]:
    """Begin a simulation in a process in which no GPU and no other rank is seen."""
    return _pool().submit(function, *arguments)


def side_by_side(
    function: Callable[..., R], arguments: Iterable[tuple[Any, ...]], advance: Callable[[], None] = lambda: None
) -> list[R]:
    """Return the results in order, from as many processes as there are cores.

    Args:
        advance: Called when a result has come.
    """
    results = []
    for future in [start(function, *each) for each in arguments]:
        results.append(future.result())
        advance()
    return results


def end() -> None:
    """Let the processes end, and their memory go."""
    if _pool.cache_info().currsize:
        _pool().shutdown()
        _pool.cache_clear()


@cache
def _pool() -> ProcessPoolExecutor:
    """Return the one pool of this process: to start a worker takes as long as a simulation."""
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_alone)


def _alone() -> None:
    from compactlm_nemo.planning.fake_world import hide_devices

    hide_devices()
    for name in _OTHER_RANKS:
        os.environ.pop(name, None)
