"""Distillation loss from hidden states: full logits never exist, the vocabulary may be sharded.

The way of a token: `linear_kd` -> `_ChunkedLoss.run` makes the student's logits of a chunk -> the targets (targets.py)
have them compared with the teacher's, by kernels on a GPU (fused.py) and else by each loss (plain.py, logit_losses.py),
whereby they become their own gradient -> `_Gradients` takes it to the inputs.

Shape suffixes: N tokens, V vocabulary rows of this rank, H student width, L losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.errors import ConfigError, DataError
from compactlm_nemo.losses.logit_losses import Objective, weighted_losses
from compactlm_nemo.losses.targets import Targets, logit_arithmetic
from compactlm_nemo.losses.vocabulary import Head, at_least_float32, token_chunks
from compactlm_nemo.parallel.collectives import all_reduce_sum


class LinearKD(NamedTuple):
    """`LinearKD` holds sums over the masked tokens: scalars, equal on every rank that shares the vocabulary."""

    loss_sum: Tensor
    """Weighted sum of the losses; carries the gradient."""
    terms: dict[str, Tensor]
    """Each loss that counts and compares with the teacher, unweighted, by its name; detached."""
    ce_sum: Tensor
    """Student's language-model loss in nats at T = 1, detached."""
    teacher_ce_sum: Tensor
    """Teacher's language-model loss in nats at T = 1, detached."""
    values_LN: Tensor | None
    """What each token adds to those sums where the mask is 1: terms in order, then both models' cross entropy; None
    unless they were to be kept."""


def linear_kd(
    hidden_NH: Tensor,
    head: Head,
    targets: Targets,
    labels_N: Tensor,
    mask_N: Tensor,
    *,
    loss: LossConfig,
    temperature: float = 1.0,
    backward_once: bool = False,
    keep_values: bool = False,
) -> LinearKD:
    """Return the summed distillation loss, computed chunk by chunk together with its gradient.

    ``loss_sum = sum_n mask_n * (sum_l weight_l * T**2 * loss_l(p_n, q_n) + weight_ce * ce_n)``, where ``q`` is the
    student's softmax of ``hidden @ weight.T / T``, ``p`` the teacher's, and the losses are those of
    `losses.logit_losses`. The gradient is made in the forward walk, so backward only scales it. Memory beside
    inputs and gradients is O(chunk_tokens * V).

    Args:
        hidden_NH: ``[N, H]``, replicated over the ranks that share the vocabulary; its gradient is the full one on
            every rank.
        head: The student's; the gradient of its weight is local, and 0 where a row is padding.
        targets: What the student is compared with on these tokens; receives no gradient.
        labels_N: ``[N]``, global vocabulary ids; any value where the mask is 0. Where the mask is not 0 a label that is
            no entry of the vocabulary makes the cross entropies NaN.
        mask_N: ``[N]``, weight of each token, 0 leaves it out.
        loss: Weights of the losses.
        temperature: T above, > 0. Cross entropy is at T = 1 always.
        backward_once: Backward scales the kept gradient in place instead of a copy, so it may run once only; saves
            memory as large as both inputs.
        keep_values: The values of each token are returned too.
    Returns:
        ``LinearKD``. Logits and their gradient are multiplied in the input dtype, all else is float32, or float64 for
        float64 inputs; the ranks' shares of the hidden states' gradient are added in float32, on a GPU in their dtype.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    if temperature <= 0:
        raise ConfigError(f"distill.temperature={temperature} must be > 0; 1.0 is plain KL.")
    if hidden_NH.shape[0] != targets.num_tokens:
        raise DataError(
            f"student tokens={hidden_NH.shape[0]} must equal teacher tokens={targets.num_tokens}"
            "; give both models the same batch."
        )
    check_tokens(hidden_NH, labels_N, mask_N)
    # Read here: inside of the function grad mode is always off.
    enabled = torch.is_grad_enabled()
    wanted = (enabled and hidden_NH.requires_grad, enabled and head.weight_VH.requires_grad)
    losses = weighted_losses(loss)
    fused = head.is_fused(hidden_NH)
    objective = Objective(losses, loss.cross_entropy, temperature, head.shard, with_gradient=any(wanted), fused=fused)
    shape = (len(losses) + 2, hidden_NH.shape[0])
    values_LN = hidden_NH.new_empty(shape, dtype=at_least_float32(hidden_NH)) if keep_values else None
    chunked = _ChunkedLoss(head, targets, objective, labels_N, mask_N, wanted, backward_once, values_LN)
    loss_sum, sums = _LinearKD.apply(hidden_NH, head.weight_VH, chunked)
    *terms, ce_sum, teacher_ce_sum = sums.unbind()
    return LinearKD(loss_sum, dict(zip(losses, terms, strict=True)), ce_sum, teacher_ce_sum, values_LN)


@dataclass(frozen=True)
class _ChunkedLoss:
    """A `_ChunkedLoss` walks over the tokens chunk by chunk; it holds all that the walk needs but hidden states."""

    head: Head
    targets: Targets
    objective: Objective
    labels_N: Tensor
    mask_N: Tensor
    wanted: tuple[bool, bool]
    """Whether hidden states and head want a gradient."""
    backward_once: bool
    values_LN: Tensor | None
    """Takes the values of each token; None where sums alone are wanted."""

    def run(self, hidden_NH: Tensor, gradients: _Gradients) -> Tensor:
        """Return ``[L + 2]``: the sums of each loss and of both models' cross entropy; adds to `gradients`."""
        num_sums = len(self.objective.losses) + 2
        sums = torch.zeros(num_sums, dtype=at_least_float32(hidden_NH), device=hidden_NH.device)
        for rows in token_chunks(hidden_NH.shape[0], self.head.chunk_tokens):
            logits_NV = self.head.logits(hidden_NH[rows])
            labels_N, mask_N = self.labels_N[rows], self.mask_N[rows].to(sums.dtype)
            for block, values_LN in self.targets.compare(rows, logits_NV, labels_N, self.objective):
                sums += masked(values_LN, mask_N[block]).sum(dim=-1)
                if self.values_LN is not None:
                    self.values_LN[:, rows][:, block] = values_LN
            if self.objective.with_gradient:
                gradients.add(rows, logits_NV, mask_N)  # the comparison has made the gradient of the logits
            del logits_NV  # before the next chunk's are made
        return sums


class _LinearKD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, chunked: _ChunkedLoss) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(hidden_NH, chunked.head, chunked.wanted, fused=chunked.objective.fused)
        sums = chunked.run(hidden_NH, gradients)
        input_gradients = gradients.finish()
        if chunked.backward_once:  # held by nothing else, so that autograd takes it over as it is
            ctx.input_gradients = input_gradients
        else:
            ctx.save_for_backward(*input_gradients)
        ctx.backward_once = chunked.backward_once
        objective = chunked.objective
        weights = [weight for weight, _ in objective.losses.values()] + [objective.ce_weight]
        loss_sum = sum(
            (weight * each for weight, each in zip(weights, sums, strict=False) if weight), sums.new_zeros(())
        )
        ctx.mark_non_differentiable(sums)
        return loss_sum, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Any, ...]:
        if not ctx.backward_once:
            scaled = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
            return (*scaled, None)
        if ctx.input_gradients is None:
            raise RuntimeError("this backward has run; call linear_kd again, or with backward_once=False.")
        input_gradients, ctx.input_gradients = ctx.input_gradients, None
        return (*[None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in input_gradients], None)


class _Gradients:
    """`_Gradients` adds up the gradients to hidden states and head, chunk by chunk, from those to the logits."""

    def __init__(self, hidden_NH: Tensor, head: Head, wanted: tuple[bool, bool], *, fused: bool) -> None:
        self.hidden_NH, self.head, self.fused = hidden_NH, head, fused
        self.to_hidden_NH = torch.zeros_like(hidden_NH) if wanted[0] else None
        sum_dtype = at_least_float32(hidden_NH)
        self.to_weight_VH = torch.empty_like(head.weight_VH, dtype=sum_dtype) if wanted[1] else None
        self.is_first = True

    def add(self, rows: slice, grad_NV: Tensor, mask_N: Tensor) -> None:
        """Add the gradient to the logits of the tokens `rows`, each weighted by the mask."""
        weight_VH, num_valid = self.head.weight_VH, self.head.num_valid
        if self.to_hidden_NH is not None:
            # Each rank holds its columns' share of the sum over the vocabulary. Added here, once, on a GPU in the
            # dtype of the product as Megatron's layers do; nothing outside may reduce it again.
            share_NH = grad_NV @ weight_VH[:num_valid]
            share_NH = share_NH.mul_(mask_N[:, None]) if self.fused else share_NH.to(mask_N.dtype) * mask_N[:, None]
            self.to_hidden_NH[rows] = all_reduce_sum(share_NH, self.head.shard.tp_group).to(self.to_hidden_NH.dtype)
        if self.to_weight_VH is not None:
            hidden_NH = self.hidden_NH[rows] * mask_N[:, None].to(self.hidden_NH.dtype)
            sum_VH = self.to_weight_VH[:num_valid]
            if grad_NV.dtype == sum_VH.dtype:
                sum_VH.addmm_(grad_NV.T, hidden_NH, beta=0 if self.is_first else 1)
            else:
                logit_arithmetic(self.fused).add_product(sum_VH, grad_NV, hidden_NH, self.is_first)
        self.is_first = False

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Return both gradients, in the dtype of their inputs; None where a gradient is not wanted."""
        if self.to_weight_VH is None:
            return self.to_hidden_NH, None
        num_valid = 0 if self.is_first else self.head.num_valid  # no token, no gradient
        self.to_weight_VH[num_valid:].zero_()
        return self.to_hidden_NH, self.to_weight_VH.to(self.head.weight_VH.dtype)


def masked(values: Tensor, mask_N: Tensor) -> Tensor:
    """Return ``[..., N]`` times the mask, and 0 where the mask is 0, whatever the value."""
    return torch.where(mask_N == 0, 0, values * mask_N)


def check_tokens(hidden_NH: Tensor, labels_N: Tensor, mask_N: Tensor) -> None:
    """Raise `DataError` where labels or mask have not one entry a token."""
    num = hidden_NH.shape[0]
    if labels_N.shape != (num,) or mask_N.shape != (num,):
        raise DataError(
            f"labels {tuple(labels_N.shape)} and mask {tuple(mask_N.shape)} must both be [{num}], one entry a token"
            "; flatten them as the hidden states."
        )
