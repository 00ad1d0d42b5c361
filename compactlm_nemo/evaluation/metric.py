"""A `Metric` is one number for each model, kept as what every unit adds to it; all that is measured has this form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from compactlm_nemo.evaluation.bootstrap import Statistic, difference, interval, mean_of_ratio
from compactlm_nemo.models.build import ModelChunks

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A `Metric` holds the parts of one statistic, of every model on the same units."""

    name: str
    """Kind and what it was measured on, as `loss/wiki`; the gate and the report call it so."""
    parts: dict[str, Tensor]
    """Model -> ``[U, K]`` float64 on the CPU, unit by unit the same documents (or questions, continuations)."""
    statistic: Statistic = mean_of_ratio
    """Of the sums over units; alone it is the mean, part 0 over part 1."""
    units: str = "documents"
    """What the units are, in plural."""
    is_better: str | None = None
    """`lower` or `higher`; None where neither is, as with a bias that has a sign."""


class Measurement(Protocol):
    """A `Measurement` sees one model after the other, since two may not fit a device, and then gives its metrics."""

    def measure(self, label: str, model: ModelChunks) -> None:
        """Measure one model, the teacher first. Collective."""

    def metrics(self) -> list[Metric]:
        """Return what was measured, equal on every rank."""

    def details(self) -> dict[str, Any]:
        """Return what is not one number a model, as JSON takes it: bins of a plot, examples."""


def summarise(metrics: Sequence[Metric], *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Return each metric as JSON takes it: every model's value with its interval, and its difference from the teacher.

    A value that does not exist, as a mean over no token, is left out; a bound that does not exist is null.
    """
    return [_summary(metric, resamples, seed) for metric in metrics]


def _summary(metric: Metric, resamples: int, seed: int) -> dict[str, Any]:
    draws = {"resamples": resamples, "seed": seed}
    models, against_teacher = {}, {}
    teacher_UK = metric.parts.get(TEACHER)
    for model, parts_UK in metric.parts.items():
        found = interval(parts_UK, metric.statistic, **draws)
        if not math.isfinite(found.value):
            continue
        models[model] = _finite(found._asdict())
        if teacher_UK is not None and model != TEACHER:
            against_teacher[model] = _finite(difference(parts_UK, teacher_UK, metric.statistic, **draws)._asdict())
    return {
        "metric": metric.name,
        "units": metric.units,
        "num_units": len(next(iter(metric.parts.values()))),
        "is_better": metric.is_better,
        "models": models,
        "against_teacher": against_teacher,
    }


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}
