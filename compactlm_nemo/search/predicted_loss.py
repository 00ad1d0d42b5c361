"""The predicted loss of a cut is a proxy from scores and eliminations, before any student is built.

    predicted_loss = sum over kept layers s_i (e_heads,i + e_mlp,i) + sum_i s_i e_hidden + (cost of the removed layers)

e are the shares of a layer's attention output, of its MLP output and of the normed residual stream that are lost by
the cut after refitting (`pruning.elimination`), s_i what the whole layer is worth: its score by `search.depth`. By
`lm_loss` the sum is in nats; by another metric the sum has no unit and only orders candidates. In either case the sum
is a proxy and no measured loss. Query groups and experts, of which no second moments exist, lose the
share of their score mass. The losses by all axes are added, as if each were small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from compactlm_nemo.importance.names import (
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
"""Name of the stream's error in the file of eliminations."""


def layer_worth(depth: Tensor) -> Tensor:
    """Return each layer's worth, `[L]` float64 >= 0: its score; of blocks that of one layer, 1 / L if not measured."""
    worth_L = depth if depth.dim() == 1 else depth[:, 0]
    if bool(worth_L.isnan().any()):
        return torch.full((len(depth),), 1 / len(depth), dtype=torch.float64)
    return worth_L.double().clamp(min=0)


def predicted_loss(teacher: Dims, scores: dict[str, Tensor], elimination: dict[str, Tensor]) -> Callable[[Dims], float]:
    """Make a function of the student: the formula above, 0 for the teacher. Each axis value is worked out once.

    Args:
        scores: One metric's vectors by `importance.names`, and `depth`.
        elimination: The tensors of `pruning.elimination`.
    """
    worth_L = layer_worth(scores[DEPTH])

    @cache
    def experts_lost(i: int, experts: int, ffn: int, shared_ffn: int) -> float:
        """Return the share of the removed experts, plus the mean share of the removed neurons of all experts."""
        names = [expert_mlp_key(i, e) for e in range(teacher.num_experts)]
        lost = [_share_lost(scores[name], ffn) for name in names]
        if teacher.shared_expert_ffn:
            lost.append(_share_lost(scores[shared_expert_key(i)], shared_ffn))
        return _share_lost(scores[experts_key(i)], experts) + sum(lost) / len(lost)

    def loss_of(student: Dims) -> float:
        layers = keep_layers(scores[DEPTH], student.num_layers).tolist()
        removed_channels = teacher.hidden_size - student.hidden_size
        loss = float(elimination[HIDDEN_ERROR][removed_channels] * worth_L[layers].sum())
        loss += _depth(scores[DEPTH], layers, worth_L)
        for i in layers:
            lost = _heads(i, teacher, student, scores, elimination)
            if not teacher.is_dense(i):
                lost += experts_lost(i, student.num_experts, student.ffn_hidden_size, student.shared_expert_ffn)
            elif not teacher.num_experts:
                lost += float(elimination[f"{mlp_key(i)}.error"][teacher.ffn_hidden_size - student.ffn_hidden_size])
            loss += float(worth_L[i]) * lost
        return loss

    return loss_of


def _share_lost(score_E: Tensor, num: int) -> float:
    return 1 - kept_share(score_E, top_units(score_E, num))


def _heads(i: int, teacher: Dims, student: Dims, scores: dict[str, Tensor], elimination: dict[str, Tensor]) -> float:
    """Return the share of the attention output that is lost with the heads of kept groups, and with whole groups."""
    groups, kept_groups = teacher.num_query_groups, student.num_query_groups
    in_all_groups = student.num_heads // kept_groups * groups
    lost = float(elimination[f"{heads_key(i)}.error"][teacher.num_heads - in_all_groups])
    if kept_groups < groups:
        lost += _share_lost(scores[groups_key(i)], kept_groups)
    return lost


def _depth(depth: Tensor, layers: list[int], worth_L: Tensor) -> float:
    """Return the cost of the layers that are not in `layers`: the score of their block, or the sum of their scores."""
    if len(layers) == len(depth):
        return 0.0
    if depth.dim() == 2:
        return max(0.0, float(depth[:, len(depth) - len(layers) - 1].nan_to_num(torch.inf).min()))
    return float(worth_L.sum() - worth_L[layers].sum())
