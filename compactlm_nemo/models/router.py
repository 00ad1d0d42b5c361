"""Routing that Megatron-Core has not: sigmoid gates with a bias of the choice, groups by DeepSeek's rules, any scaling.

Megatron's own takes as many experts of a group for its score as a token has of each group it is sent to, and always
scales sigmoids to sum to 1. Shape suffixes: N tokens, E experts, G groups, K picked experts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from compactlm_nemo.models.dims import Dims


def has_own_routing(dims: Dims) -> bool:
    """Return whether tokens are sent to experts in a way that only `GroupRouter` knows."""
    return dims.sigmoid_gates or dims.expert_groups > 1 or dims.gate_scale != 1


class GroupRouter(TopKRouter):
    """Picks the best experts of the best groups, as `routed` says; with sigmoids it has `expert_bias` `[E]`, float32.

    The bias is no trained weight: the balance of the experts sets it, which no loss of ours changes.
    """

    def __init__(self, other: TopKRouter, dims: Dims) -> None:
        groups = SimpleNamespace(
            tp=other.tp_group, cp=other.cp_group, tp_cp=other.tp_cp_group, tp_dp_cp=other.tp_dp_cp_group
        )
        super().__init__(config=other.config, pg_collection=groups)
        self.set_layer_number(other.layer_number)
        self.dims = dims
        if dims.sigmoid_gates:
            bias_E = torch.zeros(dims.num_experts, dtype=torch.float32)
            self.expert_bias = torch.nn.Parameter(bias_E, requires_grad=False)

    def routing(self, logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return gates `[N, E]`, 0 for experts that are not picked, and which are, of logits `[s, b, E]`."""
        logits_NE = logits.flatten(0, -2)
        gates_NK, picked_NK = routed(logits_NE, self.expert_bias, self.dims)
        gates_NE = torch.zeros_like(logits_NE).scatter(1, picked_NK, gates_NK.to(logits_NE.dtype))
        return gates_NE, torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, picked_NK, True)


def routed(logits_NE: Tensor, bias_E: Tensor | None, dims: Dims) -> tuple[Tensor, Tensor]:
    """Return gates and numbers of the picked experts, `[N, K]` each.

    With ``s = sigmoid(logits)``, or their softmax, and ``c = s + bias``: a group's score is the sum of its two largest
    c (its largest with softmax); of the experts of the best groups those with the largest c are picked. Gates are their
    s, divided by their sum where `norm_topk` says so, times `gate_scale`.

    Source: arXiv 2412.19437 and 2405.04434; as in transformers.
    """
    wide = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
    scores_NE = wide.sigmoid() if dims.sigmoid_gates else wide.softmax(dim=-1)
    choice_NE = scores_NE.detach() if bias_E is None else scores_NE.detach() + bias_E
    if dims.expert_groups > 1:
        by_group = choice_NE.unflatten(-1, (dims.expert_groups, -1))
        score_NG = by_group.topk(2 if dims.sigmoid_gates else 1, dim=-1).values.sum(dim=-1)
        best_NG = score_NG.topk(dims.groups_per_token, dim=-1).indices
        is_out_NG = torch.ones_like(score_NG, dtype=torch.bool).scatter(1, best_NG, False)
        choice_NE = by_group.masked_fill(is_out_NG[..., None], -torch.inf).flatten(1)
    picked_NK = choice_NE.topk(dims.experts_per_token, dim=-1).indices
    gates_NK = scores_NE.gather(1, picked_NK)
    if dims.norm_topk:
        gates_NK = gates_NK / (gates_NK.sum(dim=-1, keepdim=True) + 1e-20)
    return gates_NK * dims.gate_scale, picked_NK
