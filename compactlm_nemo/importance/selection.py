"""Selection keeps the units and layers with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from compactlm_nemo.errors import ConfigError, NumericsError
from compactlm_nemo.importance.names import (
    DEPTH,
    HIDDEN,
    expert_mlp_key,
    experts_key,
    groups_key,
    heads_key,
    mlp_key,
    shared_expert_key,
)
from compactlm_nemo.models.dims import Dims


def check_scores(teacher: Dims, scores: dict[str, Tensor]) -> None:
    """Raise ConfigError unless every score vector has the teacher's length; NumericsError on NaN or infinity.

    Scores of query groups may be missing: only a cut of groups needs them.
    """
    groups = {groups_key(i): teacher.num_query_groups for i in range(teacher.num_layers) if groups_key(i) in scores}
    for name, length in (_lengths(teacher) | groups).items():
        if name not in scores:
            raise ConfigError(f"scores: {name} is missing; run the score stage on this teacher.")
        if name == DEPTH and tuple(scores[name].shape) == (length, length):
            continue  # of blocks: not every one fits or was measured
        if tuple(scores[name].shape) != (length,):
            raise ConfigError(
                f"scores: {name} has shape {list(scores[name].shape)}, the teacher needs [{length}]; "
                "they belong to another model: run the score stage on this teacher."
            )
        if not bool(scores[name].isfinite().all()):
            raise NumericsError(f"scores: {name} holds NaN or infinity; run the score stage again in fp32.")
    extra = f"layers.{teacher.num_layers}."
    if any(name.startswith(extra) for name in scores):
        raise ConfigError(f"scores: {extra}* is beyond the teacher's {teacher.num_layers} layers; score this teacher.")


def _lengths(teacher: Dims) -> dict[str, int]:
    """Return the length of every vector that a cut needs."""
    expected = {HIDDEN: teacher.hidden_size, DEPTH: teacher.num_layers}
    for i in range(teacher.num_layers):
        expected[heads_key(i)] = teacher.num_heads
        if teacher.is_dense(i):
            expected[mlp_key(i)] = teacher.of_layer(i).ffn_hidden_size
            continue
        expected[experts_key(i)] = teacher.num_experts
        expected |= {expert_mlp_key(i, e): teacher.ffn_hidden_size for e in range(teacher.num_experts)}
        if teacher.shared_expert_ffn:
            expected[shared_expert_key(i)] = teacher.shared_expert_ffn
    return expected


def top_units(score_E: Tensor, k: int) -> Tensor:
    """Choose the units with the k highest scores, ascending int64 on the CPU; of equal scores the lower stays."""
    order = torch.sort(score_E.cpu(), descending=True, stable=True).indices
    return order[:k].sort().values


def keep_layers(depth: Tensor, num: int) -> Tensor:
    """Choose the layers that stay, ascending.

    By scores `[L]` the `num` highest, scattered; by scores of blocks `[L, L]` (the block of n layers from layer i at
    ``[i, n - 1]``) all but the block that matters least, the first of equals.
    """
    if depth.dim() == 1:
        return top_units(depth, num)
    layers = torch.arange(len(depth))
    num_removed = len(depth) - num
    if not num_removed:
        return layers
    block_L = depth[:, num_removed - 1].cpu()
    if bool(block_L.isnan().all()):
        raise ConfigError(
            f"search.depth scores no blocks of {num_removed} layers, which search.layers={num} takes out; add "
            f"{num_removed} to score.block_lengths."
        )
    start = int(block_L.nan_to_num(torch.inf).argmin())
    return layers[(layers < start) | (layers >= start + num_removed)]


def keep_heads(layer: int, teacher: Dims, student: Dims, scores: dict[str, Tensor]) -> Tensor:
    """Choose the query heads of a layer that stay, ascending: the best of each group that stays.

    Whole groups are chosen by the scores of groups. Head h belongs to group ``h // (heads / groups)``.
    """
    groups = torch.arange(teacher.num_query_groups)
    if student.num_query_groups < len(groups):
        if groups_key(layer) not in scores:
            raise ConfigError(f"scores: {groups_key(layer)} is missing; run the score stage on this teacher.")
        groups = top_units(scores[groups_key(layer)], student.num_query_groups)
    by_group = scores[heads_key(layer)].cpu().view(teacher.num_query_groups, -1)
    num_kept = student.num_heads // student.num_query_groups
    return torch.cat([top_units(by_group[g], num_kept) + g * by_group.shape[1] for g in groups.tolist()])


def keep_experts(layer: int, teacher: Dims, student: Dims, scores: dict[str, Tensor]) -> Tensor:
    """Choose the experts of a layer that stay, ascending: equally many of each group of the router's."""
    by_group = scores[experts_key(layer)].cpu().view(teacher.expert_groups, -1)
    num_kept = student.num_experts // teacher.expert_groups
    return torch.cat([top_units(score, num_kept) + g * by_group.shape[1] for g, score in enumerate(by_group)])


def kept_share(score_E: Tensor, units: Tensor) -> float:
    """Return the share of the scores that the kept units hold, ``sum over units of s / sum of s``.

    Negative scores count as 0; the share is 1 when there is nothing to lose.
    """
    mass_E = score_E.cpu().double().clamp(min=0)
    total = float(mass_E.sum())
    return float(mass_E[units].sum()) / total if total > 0 else 1.0
