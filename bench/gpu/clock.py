"""Time by CUDA events, or by the wall clock on a CPU; several ways in turn; peak memory of one pass."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Run = Callable[[], Any]


class Spans:
    """Spans of work by name. On CUDA nothing waits until `milliseconds` is asked for."""

    def __init__(self) -> None:
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the body; bodies of one name are added up."""
        start = _mark()
        try:
            yield
        finally:
            self._marks.setdefault(name, []).append((start, _mark()))

    def milliseconds(self) -> dict[str, float]:
        """Return the sum of each name's spans, and forget them."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        totals = {name: sum(_between(*pair) for pair in pairs) for name, pairs in self._marks.items()}
        self._marks.clear()
        return totals


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return start.elapsed_time(end) if torch.cuda.is_available() else (end - start) * 1000


def milliseconds(run: Run) -> float:
    """Return the time of one call, from the first kernel to the last."""
    spans = Spans()
    with spans.span("call"):
        run()
    return spans.milliseconds()["call"]


def seconds(run: Run) -> float:
    """Return the time of one call on the wall clock, with the kernels that it has started."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(runs: dict[str, Run], rounds: int, seconds_left: Callable[[], float]) -> dict[str, list[float]]:
    """Return the milliseconds of every way in every round `that_fit`, the order turned round in every other one."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in that_fit(rounds, seconds_left):
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            times[name].append(milliseconds(runs[name]))
    return times


def that_fit(rounds: int, seconds_left: Callable[[], float]) -> Iterator[int]:
    """Yield the numbers of the rounds; they end early, but not before the first, when another one might not fit."""
    for number in range(rounds):
        start = time.monotonic()
        yield number
        if seconds_left() < 2 * (time.monotonic() - start) + 1:
            break


def peak_bytes(run: Run) -> int | None:
    """Return what a call needs at its peak beyond what is allocated before it; None on a CPU."""
    if not torch.cuda.is_available():
        run()
        return None
    free()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free() -> None:
    """Give back what no longer has an owner."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
