"""Ratios of wall times that survive a machine whose speed drifts.

Every timed pass stands between two passes of its own tool's bare forward, on the same tokens and in the same process:
bare, a, bare, b, bare, ... Its ratio is its time over the mean of the two neighbours, so slow drift cancels, and a
burst of load shows as spread instead of as an advantage of one tool. The order is turned round in every other repeat.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.common.worker import Worker


@dataclass
class Group:
    """Passes of one process that are measured against its `bare`."""

    worker: Worker
    label: str
    scored: list[str]
    bare_seconds: list[float] = field(default_factory=list)
    scored_seconds: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)

    def round(self, order: Iterable[str]) -> None:
        """Time bare, a, bare, b, bare, ... once."""
        before = self._bare()
        for name in order:
            seconds = self.worker.seconds(name)
            after = self._bare()
            self.scored_seconds.setdefault(name, []).append(seconds)
            self.ratios.setdefault(name, []).append(2 * seconds / (before + after))
            before = after

    def result(self) -> dict[str, Any]:
        """All times and their summaries, as plain values."""
        scored = {
            name: {
                "seconds": summary(self.scored_seconds[name]),
                "ratio": summary(self.ratios[name]),
                "all_seconds": self.scored_seconds[name],
                "all_ratios": self.ratios[name],
            }
            for name in self.scored
        }
        bare = {"seconds": summary(self.bare_seconds), "all_seconds": self.bare_seconds}
        return {"label": self.label, "bare": bare, "scored": scored}

    def _bare(self) -> float:
        self.bare_seconds.append(self.worker.seconds("bare"))
        return self.bare_seconds[-1]


def measure(groups: list[Group], repeats: int) -> Iterator[int]:
    """Take turns through the groups `repeats` times; yields the number of every finished repeat."""
    for repeat in range(repeats):
        for group in groups if repeat % 2 == 0 else groups[::-1]:
            group.round(group.scored if repeat % 2 == 0 else group.scored[::-1])
        yield repeat + 1


def summary(values: list[float]) -> dict[str, float]:
    """Median and range: with a handful of repeats, nothing finer is meant."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
