"""Aggregators turn the values of a unit into one number: first over the tokens of a sample, then over the samples.

To add an aggregator, write: its member of `Aggregator` (and its pairs in `WidthMetric`, config/score.py), its sums in
`_block_parts` and `experts.routed_parts`, how parts join in `_appended` and `join_parts`, its value over a sequence in
`over_sequence`, and its result over samples in `State.result`.

Shape suffixes: B samples, S tokens, E scored elements (heads, neurons or channels).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from compactlm_nemo.config.score import Aggregator
from compactlm_nemo.errors import DataError
from compactlm_nemo.parallel.collectives import all_reduce_sum

Parts = dict[str, Tensor]
"""Sums over a part of a sequence, `[B, E]` each, float32 or wider: `abs` = sum|x|, `sq` = sum x^2, and
`mean` with `m2` = sum (x - mean)^2."""


Length = int | Tensor
"""How many tokens of a part of a sequence count: a number that all samples share, or `[B, 1]` float32."""


BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Most activations that are widened to float32 at once: they fit a core's cache, or a small part of a GPU's memory."""


def blocks_of(x_SBE: Tensor) -> Iterator[Tensor]:
    """Yield consecutive tokens of `[S, B, E]`, float32 or wider, a few at a time, so that no whole copy exists."""
    rows = max(1, BLOCK_ELEMENTS[x_SBE.device.type] // max(1, x_SBE[0].numel()))
    dtype = torch.promote_types(x_SBE.dtype, torch.float32)
    return (block_SBE.to(dtype) for block_SBE in x_SBE.detach().split(rows))


def sequence_parts(x_SBE: Tensor, aggs: Collection[Aggregator], counts_SB: Tensor | None = None) -> Parts:
    """Sum over dim 0 of `[S, B, E]` what the aggregators need; E may be a shard, S a part of the sequence.

    Args:
        counts_SB: Boolean, which tokens count; None for all.
    """
    parts: Parts = {}
    seen: Length = 0
    length: Length
    start = 0
    for block_SBE in blocks_of(x_SBE):
        rows = slice(start, start + len(block_SBE))
        start = rows.stop
        if counts_SB is None:
            block, length = _block_parts(block_SBE, aggs), len(block_SBE)
        else:
            block, length = _counted_parts(block_SBE, counts_SB[rows], aggs), counted_length(counts_SB[rows])
        parts = _appended(parts, seen, block, length) if parts else block
        seen = seen + length
    return parts


def counted_length(counts_SB: Tensor) -> Tensor:
    """Return `[B, 1]` float32, how many tokens of each sample count."""
    return counts_SB.sum(dim=0, dtype=torch.float32)[:, None]


def quotient(sums: Tensor, length: Length) -> Tensor:
    """Divide by a length; a part of a sequence of which no token counts has sums of 0, and means of 0."""
    return sums / length if isinstance(length, int) else sums / length.clamp(min=1)


def _counted_parts(x_SBE: Tensor, counts_SB: Tensor, aggs: Collection[Aggregator]) -> Parts:
    """Sum as `_block_parts` does over the tokens that count."""
    counts_SB1 = counts_SB[..., None]
    x_SBE = x_SBE.masked_fill(~counts_SB1, 0)
    parts: Parts = {}
    if Aggregator.mean in aggs:
        parts["abs"] = x_SBE.abs().sum(dim=0)
    if Aggregator.var in aggs:
        parts["mean"] = quotient(x_SBE.sum(dim=0), counted_length(counts_SB))
        parts["m2"] = (x_SBE - parts["mean"]).square_().masked_fill_(~counts_SB1, 0).sum(dim=0)
    if Aggregator.l2 in aggs:
        parts["sq"] = x_SBE.square().sum(dim=0)
    return parts


def _block_parts(x_SBE: Tensor, aggs: Collection[Aggregator]) -> Parts:
    parts: Parts = {}
    if Aggregator.mean in aggs:
        parts["abs"] = x_SBE.abs().sum(dim=0)
    if Aggregator.var in aggs:
        parts["mean"] = x_SBE.mean(dim=0)
        parts["m2"] = (x_SBE - parts["mean"]).square_().sum(dim=0)
    if Aggregator.l2 in aggs:
        # From `mean` and `m2` where these are known: a sum of terms >= 0, so nothing cancels.
        is_known = "m2" in parts
        parts["sq"] = parts["m2"] + len(x_SBE) * parts["mean"].square() if is_known else x_SBE.square().sum(dim=0)
    return parts


def _appended(parts: Parts, seen: Length, more: Parts, length: Length) -> Parts:
    """Join the parts of the first `seen` tokens and of the `length` tokens after these (formulas: `State.merged`)."""
    joined: Parts = {name: parts[name] + more[name] for name in ("abs", "sq") if name in parts}
    if "m2" in parts:
        gap, total = more["mean"] - parts["mean"], seen + length
        share = length / total if isinstance(length, int) else quotient(length, total)
        joined["mean"] = parts["mean"] + gap * share
        joined["m2"] = parts["m2"] + more["m2"] + gap.square() * (seen * share)
    return joined


def join_parts(parts: Parts, length: Length, group: ProcessGroup) -> tuple[Parts, Length]:
    """Join the parts of all ranks of `group`, and the lengths: a rank saw `length` tokens of every sequence that count.

    ``M2 = sum_r M2_r + length_r (mean_r - mean)^2``, ``mean = sum_r length_r mean_r / sum_r length_r``; the other parts
    add up.
    """
    joined: Parts = {name: all_reduce_sum(parts[name], group) for name in ("abs", "sq") if name in parts}
    if "m2" in parts:
        if isinstance(length, int):
            mean = all_reduce_sum(parts["mean"], group) / group.size()
        else:
            mean = quotient(all_reduce_sum(parts["mean"] * length, group), all_reduce_sum(length, group))
        spread = parts["m2"] + length * (parts["mean"] - mean).square()
        joined |= {"mean": mean, "m2": all_reduce_sum(spread, group)}
    return joined, length * group.size() if isinstance(length, int) else all_reduce_sum(length, group)


def over_sequence(parts: Parts, length: Length) -> dict[Aggregator, Tensor]:
    """Compute each aggregator that the parts allow, `[B, E]`, over sequences of which `length` tokens count.

    ``mean = (1/S) sum|x|``, ``l2 = sqrt(sum x^2)``, ``var = (1/S) sum (x - x_mean)^2``, sums over S.
    Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2.
    """
    values: dict[Aggregator, Tensor] = {}
    if "abs" in parts:
        values[Aggregator.mean] = quotient(parts["abs"], length)
    if "sq" in parts:
        values[Aggregator.l2] = parts["sq"].sqrt()
    if "m2" in parts:
        values[Aggregator.var] = quotient(parts["m2"], length)
    return values


class State(NamedTuple):
    """A state describes the samples so far: their number [], mean [E], `m2` = ``sum (v - mean)^2`` [E]; float64."""

    num: Tensor
    mean: Tensor
    m2: Tensor

    def merged(self, other: State) -> State:
        """Merge the states of two sets of samples.

        ``M2 = M2_a + M2_b + d^2 n_a n_b / n``, ``mean = mean_a + d n_b / n``, ``d = mean_b - mean_a``.
        Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance".
        """
        count = self.num + other.num
        gap_E = other.mean - self.mean
        weight = other.num / torch.where(count > 0, count, 1)  # two empty states stay empty
        return State(
            count,
            self.mean + gap_E * weight,
            self.m2 + other.m2 + gap_E.square() * self.num * weight,
        )

    def result(self, agg: Aggregator) -> Tensor:
        """Aggregate `[E]` float64: ``(1/n) sum v``, ``sqrt(sum v^2)`` or ``(1/n) sum (v - mean)^2``, as v >= 0."""
        if float(self.num) == 0:
            raise DataError("score.samples: no calibration sample reached an aggregator; give more text or samples.")
        if agg is Aggregator.mean:
            return self.mean
        if agg is Aggregator.l2:
            return (self.m2 + self.num * self.mean.square()).sqrt()
        return self.m2 / self.num


def state_of(values_BE: Tensor, weight_B1: Tensor | None = None) -> State:
    """Start a state from the values `[B, E]` of finished samples, one row a sample; B may be 0.

    Args:
        weight_B1: How much of a sample each stands for, >= 0; None for all of it.
    """
    if values_BE.ndim != 2:
        raise ValueError(f"values_BE has shape {list(values_BE.shape)}, must be [samples, elements].")
    x_BE = values_BE.detach().to(torch.float64)
    if weight_B1 is not None and x_BE.shape[0]:
        weight_B1 = weight_B1.to(torch.float64)
        total = weight_B1.sum()
        mean_E = (x_BE * weight_B1).sum(dim=0) / torch.where(total > 0, total, 1)
        return State(total, mean_E, ((x_BE - mean_E).square() * weight_B1).sum(dim=0))
    count = torch.full((), float(x_BE.shape[0]), dtype=torch.float64, device=x_BE.device)  # filled there: no copy
    mean_E = x_BE.mean(dim=0) if x_BE.shape[0] else x_BE.new_zeros(x_BE.shape[1])
    return State(count, mean_E, (x_BE - mean_E).square().sum(dim=0))
