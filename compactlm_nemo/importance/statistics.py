"""Pure running aggregates: the tokens of a sample first, then the samples.

Shape suffixes: B samples, S tokens, E scored elements (heads, neurons or channels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactlm_nemo.config.schema import Aggregator
from compactlm_nemo.errors import DataError, NumericsError

State = dict[str, Tensor]


def over_sequence(x_BSE: Tensor, agg: Aggregator) -> Tensor:
    """One number per sample and element from the tokens of the sample.

    ``mean = (1/S) sum|x|``, ``l2 = sqrt(sum x^2)``, ``var = (1/S) sum (x - x_mean)^2``, sums over S.

    Args:
        x_BSE: ``[B, S, E]``, whole sequences; E may be a shard.
        agg: The sequence aggregator.
    Returns:
        ``[B, E]``, float32 or wider, no gradient.
    Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2.
    """
    x_BSE = x_BSE.detach().to(torch.promote_types(x_BSE.dtype, torch.float32))
    if agg is Aggregator.mean:
        return x_BSE.abs().mean(dim=1)
    if agg is Aggregator.l2:
        return x_BSE.square().sum(dim=1).sqrt()
    return x_BSE.var(dim=1, correction=0)


class SampleAggregate:
    """The batch aggregator: one value per element from one finished value per sample, in one pass.

    Accumulators are float64, so the result does not depend on how samples were batched or spread over ranks
    (up to the rounding of float64).
    """

    def __init__(self, batch: Aggregator) -> None:
        self.batch = batch
        self._state: State | None = None

    def add(self, values_BE: Tensor) -> None:
        """Take in ``[B, E]``, one row per finished sample; B may be 0."""
        if values_BE.ndim != 2:
            raise ValueError(f"values_BE has shape {list(values_BE.shape)}, must be [samples, elements].")
        if values_BE.shape[0] == 0:
            return
        x_BE = values_BE.detach().to(torch.float64)
        count = torch.tensor(x_BE.shape[0], dtype=torch.float64, device=x_BE.device)
        if self.batch is Aggregator.var:
            mean_E = x_BE.mean(dim=0)
            self.merge({"count": count, "mean": mean_E, "m2": (x_BE - mean_E).square().sum(dim=0)})
        else:
            self.merge({"count": count, "sum_abs": x_BE.abs().sum(dim=0), "sum_sq": x_BE.square().sum(dim=0)})

    def state(self) -> State:
        """Float64 accumulators: `count` [] and, over the samples so far,

        mean, l2: `sum_abs` [E], `sum_sq` [E]; states of disjoint samples merge by addition.
        var: `mean` [E], `m2` [E] = ``sum (x - mean)^2``; states merge by Chan's formula (`merge`), not by addition.
        """
        if self._state is None:
            raise DataError("score.samples: no calibration sample reached this aggregate; give more text or samples.")
        return {name: value.clone() for name, value in self._state.items()}

    def merge(self, other: State) -> None:
        """Take in the state of an aggregate over other samples.

        ``M2 = M2_a + M2_b + d^2 n_a n_b / n``, ``mean = mean_a + d n_b / n``, ``d = mean_b - mean_a``.
        Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance".
        """
        expected = {"count", "mean", "m2"} if self.batch is Aggregator.var else {"count", "sum_abs", "sum_sq"}
        if set(other) != expected:
            raise ValueError(f"state has {sorted(other)}, a {self.batch.value} aggregate needs {sorted(expected)}.")
        mine = self._state
        if mine is None:
            self._state = {name: value.clone() for name, value in other.items()}
        elif self.batch is Aggregator.var:
            count = mine["count"] + other["count"]
            gap_E = other["mean"] - mine["mean"]
            weight = other["count"] / count.clamp(min=1)  # two empty states stay empty
            self._state = {
                "count": count,
                "mean": mine["mean"] + gap_E * weight,
                "m2": mine["m2"] + other["m2"] + gap_E.square() * mine["count"] * weight,
            }
        else:
            self._state = {name: value + other[name] for name, value in mine.items()}

    def result(self) -> Tensor:
        """``[E]`` float64: ``(1/n) sum|x|``, ``sqrt(sum x^2)`` or ``(1/n) sum (x - mean)^2`` over the samples."""
        state = self.state()
        if self.batch is Aggregator.mean:
            score_E = state["sum_abs"] / state["count"]
        elif self.batch is Aggregator.l2:
            score_E = state["sum_sq"].sqrt()
        else:
            score_E = state["m2"] / state["count"]
        if not bool(score_E.isfinite().all()):
            bad = int((~score_E.isfinite()).sum())
            raise NumericsError(f"importance: {bad} of {score_E.numel()} scores are NaN or infinite; try fp32.")
        return score_E
