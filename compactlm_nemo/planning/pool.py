"""Simulations side by side: each takes a core for seconds, and none needs another's result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

R = TypeVar("R")

_OTHER_RANKS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def side_by_side(
    function: Callable[..., R], arguments: Iterable[tuple[Any, ...]], advance: Callable[[], None] = lambda: None
) -> list[R]:
    """Return the results in order, from as many processes as there are cores, in which no GPU and no rank is seen.

    Args:
        advance: Called when a result has come.
    """
    tasks = list(arguments)
    workers = max(1, min(len(tasks), len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_alone) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        results = []
        for future in futures:
            results.append(future.result())
            advance()
    return results


def _alone() -> None:
    from compactlm_nemo.planning.fake_world import hide_devices

    hide_devices()
    for name in _OTHER_RANKS:
        os.environ.pop(name, None)
