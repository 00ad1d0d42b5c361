"""What a cut is expected to cost, from scores and from what each layer can spare, before any student is built.

    damage = sum over kept layers s_i (e_heads,i + e_mlp,i) + sum_i s_i e_hidden + (cost of the removed layers)

e are the shares of a layer's attention output, of its MLP output and of the normed residual stream that are lost by
the cut after refitting (`pruning.elimination`), s_i what the whole layer is worth: its score by `search.depth`. By
`lm_loss` the damage is in nats; by another metric it only orders. Query groups and experts, of which no second moments
exist, lose the share of their score mass. Damages of axes are added, as if they were small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from compactlm_nemo.importance.scores import (
    DEPTH,
    expert_mlp_key,
    experts_key,
    groups_key,
    heads_key,
    mlp_key,
    shared_expert_key,
)
from compactlm_nemo.importance.selection import keep_layers, kept_share, top_units
from compactlm_nemo.models.dims import Dims

HIDDEN_ERROR = "hidden.error"


def layer_worth(depth: Tensor) -> Tensor:
    """`[L]` float64 >= 0: the score of each layer; of blocks that of one layer, or 1 / L where none was measured."""
    own_L = depth if depth.dim() == 1 else depth[:, 0]
    if bool(own_L.isnan().any()):
        return torch.full((len(depth),), 1 / len(depth), dtype=torch.float64)
    return own_L.double().clamp(min=0)


def predicted_damage(teacher: Dims, scores: dict[str, Tensor], spare: dict[str, Tensor]) -> Callable[[Dims], float]:
    """Student -> the formula above; 0 for the teacher itself. Each axis value is worked out once."""
    worth_L = layer_worth(scores[DEPTH])

    @cache
    def experts_lost(i: int, experts: int, ffn: int, shared_ffn: int) -> float:
        """Share of the experts that go, and of the neurons of all that stay or see every token, on average."""
        names = [expert_mlp_key(i, e) for e in range(teacher.num_experts)]
        lost = [_share_lost(scores[name], ffn) for name in names]
        if teacher.shared_expert_ffn:
            lost.append(_share_lost(scores[shared_expert_key(i)], shared_ffn))
        return _share_lost(scores[experts_key(i)], experts) + sum(lost) / len(lost)

    def damage_of(student: Dims) -> float:
        kept = keep_layers(scores[DEPTH], student.num_layers).tolist()
        gone_hidden = teacher.hidden_size - student.hidden_size
        damage = float(spare[HIDDEN_ERROR][gone_hidden] * worth_L[kept].sum()) + _depth(scores[DEPTH], kept, worth_L)
        for i in kept:
            lost = _heads(i, teacher, student, scores, spare)
            if teacher.num_experts:
                lost += experts_lost(i, student.num_experts, student.ffn_hidden_size, student.shared_expert_ffn)
            else:
                lost += float(spare[f"{mlp_key(i)}.error"][teacher.ffn_hidden_size - student.ffn_hidden_size])
            damage += float(worth_L[i]) * lost
        return damage

    return damage_of


def _share_lost(score_E: Tensor, num: int) -> float:
    return 1 - kept_share(score_E, top_units(score_E, num))


def _heads(i: int, teacher: Dims, student: Dims, scores: dict[str, Tensor], spare: dict[str, Tensor]) -> float:
    """Share of the attention output that is lost with the heads of kept groups, and with whole groups."""
    groups, kept_groups = teacher.num_query_groups, student.num_query_groups
    in_all_groups = student.num_heads // kept_groups * groups
    lost = float(spare[f"{heads_key(i)}.error"][teacher.num_heads - in_all_groups])
    if kept_groups < groups:
        lost += _share_lost(scores[groups_key(i)], kept_groups)
    return lost


def _depth(depth: Tensor, kept: list[int], worth_L: Tensor) -> float:
    """What the removed layers cost: the score of their block, or the sum of their scores."""
    if len(kept) == len(depth):
        return 0.0
    if depth.dim() == 2:
        return max(0.0, float(depth[:, len(depth) - len(kept) - 1].nan_to_num(torch.inf).min()))
    return float(worth_L.sum() - worth_L[kept].sum())
