"""How alike the two tools' scores of the same units on the same tokens are."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from torch import Tensor

from compactlm_nemo.importance.agreement import per_vector, spearman

UNNORMED = "hidden without the final norm"
"""A vector of ours that sums the channels' scores over the norms that Model-Optimizer sums over."""


def agree(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Axis -> how alike the two tools' scores of its vectors (one a layer) are, in rank and in value.

    The same formula: neurons, layers, and channels once our final norm is left out. Another one: heads, where
    Model-Optimizer takes the mean over tokens of each channel before the norm over the head's channels, and channels.
    """
    rho, gap = (per_axis(own, theirs, measure) for measure in (spearman, largest_gap))
    return {
        axis: {"vectors": len(rho[axis]), "mean": fmean(rho[axis]), "min": min(rho[axis]), "gap": max(gap[axis])}
        for axis in rho
    }


def per_axis(
    own: dict[str, Tensor], theirs: dict[str, Tensor], measure: Callable[[Tensor, Tensor], float]
) -> dict[str, list[float]]:
    """Axis -> `measure` of each of its vectors, with the channels once more without our final norm."""
    result = per_vector({name: own[name] for name in theirs}, theirs, measure)
    return result | {UNNORMED: [measure(own[UNNORMED], theirs["hidden"])]}


def largest_gap(own: Tensor, theirs: Tensor) -> float:
    """Largest relative difference of an entry, each vector divided by its mean: only proportions matter to a cut."""
    own, theirs = own.double() / own.double().mean(), theirs.double() / theirs.double().mean()
    return float(((own - theirs).abs() / theirs).max())
