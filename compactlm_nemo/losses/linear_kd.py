"""Distillation loss from hidden states: full logits never exist, the vocabulary may be sharded.

Shape suffixes: N tokens, V vocabulary rows of this rank, H student width, L losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.errors import ConfigError, DataError
from compactlm_nemo.losses.logit_losses import weighted_losses
from compactlm_nemo.losses.targets import Comparison, HeadSettings, Targets
from compactlm_nemo.losses.vocabulary import LogProbs, VocabShard, blocks, chunks, wide
from compactlm_nemo.parallel.collectives import all_reduce_sum


class LinearKD(NamedTuple):
    """Sums over the masked tokens: scalars, equal on every rank of the group."""

    loss_sum: Tensor
    """Weighted sum of the losses; carries the gradient."""
    terms: dict[str, Tensor]
    """Each loss that counts and compares with the teacher, unweighted, by its name; detached."""
    ce_sum: Tensor
    """Student's language-model loss in nats at T = 1, detached."""
    teacher_ce_sum: Tensor
    """Teacher's, detached."""


def linear_kd(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: Targets,
    labels_N: Tensor,
    mask_N: Tensor,
    *,
    loss: LossConfig,
    temperature: float = 1.0,
    chunk_tokens: int,
    vocab_size: int,
    vocab_start: int = 0,
    tp_group: ProcessGroup | None = None,
    backward_once: bool = False,
) -> LinearKD:
    """Summed distillation loss, computed chunk by chunk together with its gradient.

    ``loss_sum = sum_n mask_n * (sum_l weight_l * T**2 * loss_l(p_n, q_n) + weight_ce * ce_n)``, where ``q`` is the
    student's softmax of ``hidden @ weight.T / T``, ``p`` the teacher's, and the losses are those of
    `losses.logit_losses`. The gradient is made in the forward walk, so backward only scales it. Memory beside
    inputs and gradients is O(chunk_tokens * V).

    Args:
        hidden_NH: ``[N, H]``, replicated over ``tp_group``; its gradient is the full one on every rank.
        weight_VH: ``[V, H]``, this rank's shard, of the dtype of the hidden states; its gradient is local.
        targets: What the teacher says of the same tokens; receives no gradient.
        labels_N: ``[N]``, global vocabulary ids; any value where the mask is 0. Where the mask is not 0 a label that is
            no entry of the vocabulary makes the cross entropies NaN.
        mask_N: ``[N]``, weight of each token, 0 leaves it out.
        loss: Weights of the losses.
        temperature: T above, > 0. Cross entropy is at T = 1 always.
        chunk_tokens: Tokens whose logits exist at the same time.
        vocab_size: Entries of the vocabulary without padding, over all ranks.
        vocab_start: Global id of row 0 of the shard. Rows whose id is >= ``vocab_size`` are in no softmax and get
            zero gradient.
        tp_group: Ranks sharing the vocabulary; None when V is all of it.
        backward_once: Backward scales the kept gradient in place instead of a copy, so it may run once only; saves
            memory as large as both inputs.
    Returns:
        ``LinearKD``. Logits are multiplied in the input dtype, all else is float32, or float64 for float64 inputs.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    if temperature <= 0:
        raise ConfigError(f"distill.temperature={temperature} must be > 0; 1.0 is plain KL.")
    if hidden_NH.shape[0] != targets.num_tokens:
        raise DataError(
            f"student tokens={hidden_NH.shape[0]} must equal teacher tokens={targets.num_tokens}"
            "; give both models the same batch."
        )
    # Read here: inside of the function grad mode is always off.
    enabled = torch.is_grad_enabled()
    wanted = (enabled and hidden_NH.requires_grad, enabled and weight_VH.requires_grad)
    losses, shard = weighted_losses(loss), VocabShard(vocab_size, vocab_start, tp_group)
    settings = HeadSettings(losses, temperature, shard, with_gradient=any(wanted))
    walk = _ChunkedLoss(targets, settings, loss.cross_entropy, labels_N, mask_N, chunk_tokens, wanted, backward_once)
    check_tokens(hidden_NH, labels_N, mask_N, chunk_tokens)
    loss_sum, sums = _LinearKD.apply(hidden_NH, weight_VH, walk)
    *terms, ce_sum, teacher_ce_sum = sums.unbind()
    return LinearKD(loss_sum, dict(zip(losses, terms, strict=True)), ce_sum, teacher_ce_sum)


@dataclass(frozen=True)
class _ChunkedLoss:
    """All that the walk over the tokens needs beside what gets a gradient."""

    targets: Targets
    settings: HeadSettings
    ce_weight: float
    labels_N: Tensor
    mask_N: Tensor
    chunk_tokens: int
    wanted: tuple[bool, bool]
    """Whether hidden states and head want a gradient."""
    backward_once: bool

    def over(self, hidden_NH: Tensor, weight_VH: Tensor, gradients: _Gradients) -> Tensor:
        """``[L + 2]``: sums of each loss and of both models' cross entropy."""
        losses, _, shard, with_gradient = self.settings
        sums = torch.zeros(len(losses) + 2, dtype=wide(hidden_NH), device=hidden_NH.device)
        for rows in chunks(hidden_NH.shape[0], self.chunk_tokens):
            logits_NV, labels_N = shard.logits(hidden_NH[rows], weight_VH), self.labels_N[rows]
            mask_N, compare = self.mask_N[rows].to(sums.dtype), self.targets.chunk(rows, self.settings)
            for block in blocks(logits_NV, shard):
                compared = compare(logits_NV[block], labels_N[block], block)
                each = [compared.values_LN, compared.student.ce_N[None], compared.teacher_ce_N[None]]
                sums += masked(torch.cat(each), mask_N[block]).sum(dim=-1)
                if with_gradient:  # it takes the place of the logits, which have served
                    logits_NV[block] = self._gradient(compared, labels_N[block])
            if with_gradient:
                gradients.add(rows, logits_NV, mask_N)
        return sums

    def _gradient(self, compared: Comparison, labels_N: Tensor) -> Tensor:
        """Of the weighted losses of each token to its logits."""
        grad_NV = compared.gradient_NV
        if self.ce_weight:
            own_NV = _ce_gradient(compared.student, labels_N, self.settings).mul_(self.ce_weight)
            grad_NV = own_NV if grad_NV is None else grad_NV.add_(own_NV)
        assert grad_NV is not None  # LossConfig demands a weight
        return grad_NV


class _LinearKD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, walk: _ChunkedLoss) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(hidden_NH, weight_VH, walk.settings.shard, walk.wanted)
        sums = walk.over(hidden_NH, weight_VH, gradients)
        kept = gradients.made()
        if walk.backward_once:  # held by nothing else, so that autograd takes it over as it is
            ctx.own = kept
        else:
            ctx.save_for_backward(*kept)
        ctx.backward_once = walk.backward_once
        weights = [weight for weight, _ in walk.settings.losses.values()] + [walk.ce_weight]
        loss_sum = sum(
            (weight * each for weight, each in zip(weights, sums, strict=False) if weight), sums.new_zeros(())
        )
        ctx.mark_non_differentiable(sums)
        return loss_sum, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Any, ...]:
        if not ctx.backward_once:
            scaled = [None if kept is None else kept * grad_loss.to(kept.dtype) for kept in ctx.saved_tensors]
            return (*scaled, None)
        if ctx.own is None:
            raise RuntimeError("this backward has run; call linear_kd again, or with backward_once=False.")
        own, ctx.own = ctx.own, None
        return (*[None if kept is None else kept.mul_(grad_loss.to(kept.dtype)) for kept in own], None)


class _Gradients:
    """Gradients to hidden states and head, added chunk by chunk from those to the logits."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, shard: VocabShard, wanted: tuple[bool, bool]) -> None:
        self.hidden_NH, self.weight_VH, self.shard = hidden_NH, weight_VH, shard
        self.to_hidden_NH = torch.zeros_like(hidden_NH) if wanted[0] else None
        self.to_weight_VH = torch.empty_like(weight_VH, dtype=wide(hidden_NH)) if wanted[1] else None
        self.is_first = True

    def add(self, rows: slice, wide_NV: Tensor, mask_N: Tensor) -> None:
        """Takes the gradient to the logits of some tokens, and the weight of each token."""
        num_valid = self.shard.num_valid(self.weight_VH)
        grad_NV = wide_NV.to(self.weight_VH.dtype)
        if self.to_hidden_NH is not None:
            # Each rank holds its columns' share of the sum over the vocabulary. Added here, once and in wide
            # dtype; nothing outside may reduce it again.
            share_NH = (grad_NV @ self.weight_VH[:num_valid]).to(wide_NV.dtype) * mask_N[:, None]
            self.to_hidden_NH[rows] = all_reduce_sum(share_NH, self.shard.tp_group).to(self.to_hidden_NH.dtype)
        if self.to_weight_VH is not None:
            hidden_NH = self.hidden_NH[rows] * mask_N[:, None].to(self.hidden_NH.dtype)
            sum_VH = self.to_weight_VH[:num_valid]
            if grad_NV.dtype == sum_VH.dtype:
                sum_VH.addmm_(grad_NV.T, hidden_NH, beta=0 if self.is_first else 1)
            elif self.is_first:
                sum_VH.copy_(grad_NV.T @ hidden_NH)
            else:
                sum_VH += grad_NV.T @ hidden_NH
        self.is_first = False

    def made(self) -> tuple[Tensor | None, Tensor | None]:
        """Both, in the dtype of their inputs; None where it is not wanted."""
        if self.to_weight_VH is None:
            return self.to_hidden_NH, None
        num_valid = 0 if self.is_first else self.shard.num_valid(self.weight_VH)  # no token, no gradient
        self.to_weight_VH[num_valid:].zero_()
        return self.to_hidden_NH, self.to_weight_VH.to(self.weight_VH.dtype)


def _ce_gradient(student: LogProbs, labels_N: Tensor, settings: HeadSettings) -> Tensor:
    """``[N, V]``: gradient of the cross entropy at T = 1 to the logits: ``softmax(z)_v - [v = label]``."""
    if settings.temperature == 1:
        plain_NV = student.prob_NV.clone()
    else:
        plain_NV = (student.log_prob_NV * settings.temperature).add_(student.plain_shift_N1).exp_()
    ones_N1 = torch.ones_like(labels_N, dtype=plain_NV.dtype)[:, None]
    return settings.shard.add_at(plain_NV, labels_N[:, None], -ones_N1)


def masked(values: Tensor, mask_N: Tensor) -> Tensor:
    """``[..., N]`` times the mask, and 0 where that is 0, whatever the value."""
    return torch.where(mask_N == 0, 0, values * mask_N)


def check_tokens(hidden_NH: Tensor, labels_N: Tensor, mask_N: Tensor, chunk_tokens: int) -> None:
    """Shapes of what belongs together, and the chunk size."""
    if chunk_tokens <= 0:
        raise ConfigError(f"chunk_tokens={chunk_tokens} must be > 0; try 512.")
    num = hidden_NH.shape[0]
    if labels_N.shape != (num,) or mask_N.shape != (num,):
        raise DataError(
            f"labels {tuple(labels_N.shape)} and mask {tuple(mask_N.shape)} must both be [{num}], one entry a token"
            "; flatten them as the hidden states."
        )
