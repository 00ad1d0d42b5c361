"""Learned maps from the student's width to the teacher's, which exist for a hidden-state loss and end with training.

Projections are no part of the student: every rank holds all projections in float32 with an AdamW of their own, and
their gradients are summed over all ranks, so the projections stay equal on every rank.

Shape suffixes: S sequence (this rank's part of it), B batch, H student width, G teacher width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.parallel.collectives import world_sum


class Projections:
    """``P`` of each pair, one for all pairs or one each.

    Args:
        num_pairs: Pairs that are projected.
        is_shared: One P for all pairs.
        start_GH: ``[G, H]``, every P at the start.
        cfg: Rates of AdamW and the norm at which gradients are clipped.
    """

    def __init__(self, num_pairs: int, is_shared: bool, start_GH: Tensor, cfg: DistillConfig) -> None:
        count = 1 if is_shared else num_pairs
        self.weights = [torch.nn.Parameter(start_GH.float().clone()) for _ in range(count)]
        self.clip_grad = cfg.clip_grad
        self.adam = torch.optim.AdamW(self.weights, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0)

    def __call__(self, pair: int, state_SBH: Tensor) -> Tensor:
        """Return ``P s``, `[S, B, G]` in the dtype of the state."""
        weight_GH = self.weights[pair if len(self.weights) > 1 else 0]
        return state_SBH @ weight_GH.T.to(state_SBH.dtype)

    def zero_grad(self) -> None:
        """Forget the gradients, before a pass."""
        self.adam.zero_grad(set_to_none=True)

    def reduce(self, num_tokens: float, counts: bool) -> None:
        """Sum the gradients over the ranks that count, divided by the tokens of the global batch. Collective."""
        for weight in self.weights:
            gradient = torch.zeros_like(weight) if weight.grad is None or not counts else weight.grad
            weight.grad = world_sum(gradient) / num_tokens

    def step(self, lr: float) -> None:
        """Move the projections against their gradients, whose common norm is clipped as the student's is."""
        if self.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.weights, self.clip_grad)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()

    def state(self) -> dict[str, Any]:
        """Return weights and AdamW's moments."""
        return {"weights": [weight.detach() for weight in self.weights], "adam": self.adam.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        for weight, stored in zip(self.weights, state["weights"], strict=True):
            weight.data.copy_(stored)
        self.adam.load_state_dict(state["adam"])
