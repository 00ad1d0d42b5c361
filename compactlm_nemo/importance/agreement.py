"""Rank correlations say how far two sets of scores order a model's units alike; the order alone decides a cut."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import numpy as np
from scipy import stats
from torch import Tensor

from compactlm_nemo.errors import DataError, NumericsError
from compactlm_nemo.importance.names import NAME_PATTERNS, axis_of


def kendall_tau(a: Tensor, b: Tensor) -> float:
    """Return Kendall's tau-b of two vectors of one length, in [-1, 1].

    ``(C - D) / sqrt((P - T_a) * (P - T_b))`` over the P pairs of entries: C ordered the same way by both vectors, D the
    opposite way, T_a and T_b tied in a and in b.

    Where the formula has no value: two vectors that order alike agree fully, so two constants (and so two vectors of
    length 0 or 1) give 1.0; a constant says nothing about the order of a vector that is not constant, which gives 0.0.

    Raises:
        DataError: the shapes differ or are not those of vectors.
        NumericsError: an entry is NaN; infinities have a place in the order and are allowed.
    Source: Kendall 1945, "The treatment of ties in ranking problems".
    """
    return _correlation(a, b, lambda x, y: stats.kendalltau(x, y).statistic)


def spearman(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rho: Pearson's correlation of the ranks, where tied entries share the mean of their ranks.

    Constants, lengths 0 and 1, and errors as in `kendall_tau`.
    """
    return _correlation(a, b, lambda x, y: stats.spearmanr(x, y).statistic)


def _correlation(a: Tensor, b: Tensor, measure: Callable[[np.ndarray, np.ndarray], float]) -> float:
    if a.shape != b.shape or a.dim() != 1:
        raise DataError(f"shapes {list(a.shape)} and {list(b.shape)}: ranks compare two vectors of one length.")
    x, y = (vector.detach().cpu().double().numpy() for vector in (a, b))
    if np.isnan(x).any() or np.isnan(y).any():
        raise NumericsError("scores hold NaN, which has no rank; run the score stage again in fp32.")
    ranks_x, ranks_y = (stats.rankdata(vector, method="dense") for vector in (x, y))
    if np.array_equal(ranks_x, ranks_y):
        return 1.0  # exactly: the formulas round, and a stopping rule with tolerance 0 would never be met
    if ranks_x.max() == 1 or ranks_y.max() == 1:
        return 0.0
    return float(measure(x, y))


def per_vector(
    first: dict[str, Tensor], second: dict[str, Tensor], measure: Callable[[Tensor, Tensor], float] = kendall_tau
) -> dict[str, list[float]]:
    """Return axis -> the correlation of each of its vectors, by layer (and expert) in the order of `first`.

    Args:
        first, second: Plain names (`hidden`, `layers.0.mlp`, ..., `depth`) to vectors; the same names in both.
        measure: `kendall_tau` or `spearman`.
    Raises:
        DataError: a vector is missing in one or has another length there.
    """
    for name in sorted(first.keys() ^ second.keys()):
        holder, other = ("first", "second") if name in first else ("second", "first")
        length = (first | second)[name].numel()
        raise DataError(
            f"axis {axis_of(name)}: {name} ({length} values) is in the {holder} scores, not in the {other}."
        )
    correlations: dict[str, list[float]] = {axis: [] for axis in NAME_PATTERNS}
    for name, a in first.items():
        axis, b = axis_of(name), second[name]
        if a.shape != b.shape:
            raise DataError(
                f"axis {axis}: {name} has {a.numel()} values in the first scores and {b.numel()} in the second; "
                "they are of different models."
            )
        correlations[axis].append(measure(a, b))
    return {axis: values for axis, values in correlations.items() if values}


def agreement(
    first: dict[str, Tensor], second: dict[str, Tensor], measure: Callable[[Tensor, Tensor], float] = kendall_tau
) -> dict[str, float]:
    """Return axis -> mean correlation of its vectors over layers (and experts); arguments, errors as in `per_vector`.

    Axes are `hidden`, `heads`, `groups`, `mlp`, `experts`, `expert_mlp`, `shared_expert` and `depth`, those present.
    """
    return {axis: fmean(values) for axis, values in per_vector(first, second, measure).items()}


def settled(previous: dict[str, Tensor], current: dict[str, Tensor]) -> float:
    """Return how much the axis that moved most has moved: ``max over axes of 1 - mean tau``, in [0, 2].

    Arguments and errors as in `per_vector`; without any vector there is nothing to judge, which is an error too.
    """
    taus = agreement(previous, current)
    if not taus:
        raise DataError("there are no scores whose ranks could have settled; name at least one metric.")
    return max(1 - tau for tau in taus.values())
