"""Which units stay, and how much of the measured importance a candidate keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compactlm_nemo.errors import ConfigError, NumericsError
from compactlm_nemo.importance.scores import DEPTH, HIDDEN, heads_key, mlp_key
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import num_params


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One architecture with its rank information; `dataclasses.asdict` gives its JSON form."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    params: int
    kept_importance: float
    """Share of the teacher's importance that the cut keeps, in [0, 1]."""

    def dims(self, teacher: Dims) -> Dims:
        """The teacher's architecture in this candidate's sizes."""
        return teacher.with_shape(layers=self.layers, hidden=self.hidden, ffn=self.ffn, heads=self.heads)


def check_scores(teacher: Dims, scores: dict[str, Tensor]) -> None:
    """ConfigError unless every score vector is there in the teacher's length; NumericsError on NaN or infinity."""
    expected = {HIDDEN: teacher.hidden_size, DEPTH: teacher.num_layers}
    for i in range(teacher.num_layers):
        expected |= {mlp_key(i): teacher.ffn_hidden_size, heads_key(i): teacher.num_heads}
    for name, length in expected.items():
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


def top_units(score_E: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores, ascending, int64 on the CPU; of equal scores the lower index stays."""
    order = torch.sort(score_E.cpu(), descending=True, stable=True).indices
    return order[:k].sort().values


def keep_layers(depth: Tensor, num: int) -> Tensor:
    """The layers that stay, ascending.

    By scores `[L]` the `num` highest, scattered; by scores of blocks `[L, L]` (the block of n layers from layer i at
    ``[i, n - 1]``) all but the block that matters least, the first of equals.
    """
    if depth.dim() == 1:
        return top_units(depth, num)
    layers = torch.arange(len(depth))
    gone = len(depth) - num
    if not gone:
        return layers
    block_L = depth[:, gone - 1].cpu()
    if bool(block_L.isnan().all()):
        raise ConfigError(
            f"search.depth scores no blocks of {gone} layers, which search.layers={num} takes out; add {gone} to "
            "score.block_lengths."
        )
    start = int(block_L.nan_to_num(torch.inf).argmin())
    return layers[(layers < start) | (layers >= start + gone)]


def depth_share(depth: Tensor, num: int) -> float:
    """How much of the importance of layers stays: as `kept_share`; of blocks exp(-score of the removed one)."""
    kept = keep_layers(depth, num)
    if depth.dim() == 1:
        return kept_share(depth, kept)
    if num == len(depth):
        return 1.0
    return math.exp(-max(0.0, float(depth[:, len(depth) - num - 1].nan_to_num(torch.inf).min())))


def top_heads(score_E: Tensor, k: int, groups: int) -> Tensor:
    """Indices of k query heads, ascending: the best ``k / groups`` of each group.

    Head h belongs to group ``h // (heads / groups)``; `groups` must divide k and the number of heads.
    """
    per_group = score_E.numel() // groups
    chosen = [top_units(score, k // groups) + g * per_group for g, score in enumerate(score_E.split(per_group))]
    return torch.cat(chosen)


def kept_share(score_E: Tensor, kept: Tensor) -> float:
    """``sum over kept of s / sum of s``, negative scores counted as 0; 1 when there is nothing to lose."""
    mass_E = score_E.cpu().double().clamp(min=0)
    total = float(mass_E.sum())
    return float(mass_E[kept].sum()) / total if total > 0 else 1.0


def rank_candidates(teacher: Dims, candidates: list[Dims], scores: dict[str, Tensor]) -> list[Candidate]:
    """Candidates by `kept_importance`, best first; of equals the smaller model, then the order given.

    ``kept = share(hidden) * mean_l share(mlp_l) * mean_l share(heads_l) * share(depth)``, where share is the part of
    the score mass held by the units that stay (query heads chosen inside their groups) and l runs over all layers
    of the teacher.
    """
    check_scores(teacher, scores)
    layers, groups = range(teacher.num_layers), teacher.num_query_groups

    def kept_importance(dims: Dims) -> float:
        mlp = [kept_share(scores[mlp_key(i)], top_units(scores[mlp_key(i)], dims.ffn_hidden_size)) for i in layers]
        heads = [
            kept_share(scores[heads_key(i)], top_heads(scores[heads_key(i)], dims.num_heads, groups)) for i in layers
        ]
        hidden = kept_share(scores[HIDDEN], top_units(scores[HIDDEN], dims.hidden_size))
        depth = depth_share(scores[DEPTH], dims.num_layers)
        return hidden * sum(mlp) / len(mlp) * sum(heads) / len(heads) * depth

    ranked = [
        Candidate(
            layers=dims.num_layers,
            hidden=dims.hidden_size,
            ffn=dims.ffn_hidden_size,
            heads=dims.num_heads,
            params=num_params(dims),
            kept_importance=kept_importance(dims),
        )
        for dims in candidates
    ]
    return sorted(ranked, key=lambda c: (-c.kept_importance, c.params))
