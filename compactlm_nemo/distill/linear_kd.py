"""Distillation and language-model loss from hidden states: full logits never exist, the vocabulary may be sharded.

Shape suffixes: N tokens, V vocabulary rows of this rank, H student width, G teacher width, M models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from compactlm_nemo.errors import ConfigError, DataError
from compactlm_nemo.parallel.collectives import all_reduce_max, all_reduce_sum


class LinearKD(NamedTuple):
    """Sums over the masked tokens in nats: scalars, equal on every rank of the group."""

    kd_sum: Tensor
    """`T**2 * KL(teacher || student)`; carries the gradient."""
    ce_sum: Tensor
    """Student's language-model loss at T = 1, detached."""
    teacher_ce_sum: Tensor
    """Teacher's language-model loss at T = 1, detached."""


class _Shard(NamedTuple):
    """The rows of the vocabulary that this rank holds; ids from `vocab_size` on are padding."""

    vocab_size: int
    vocab_start: int
    tp_group: ProcessGroup | None

    def num_valid(self, weight_VH: Tensor) -> int:
        """Leading rows of the shard that are no padding; 0 where the whole shard is padding."""
        return min(max(self.vocab_size - self.vocab_start, 0), weight_VH.shape[0])


def linear_kd(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    labels_N: Tensor,
    mask_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int,
    vocab_size: int,
    vocab_start: int = 0,
    tp_group: ProcessGroup | None = None,
) -> LinearKD:
    """Summed forward KL from teacher to student, computed chunk by chunk together with its gradient.

    ``kd_sum = sum_n mask_n * T**2 * sum_v p_nv * (log p_nv - log q_nv)`` with
    ``p = softmax(teacher_hidden @ teacher_weight.T / T)``, ``q = softmax(student_hidden @ student_weight.T / T)``.
    The gradient to the student's logits is ``mask_n * T * (q_nv - p_nv)``; both gradients are made in the forward
    walk, so backward only scales them. Memory beside inputs and gradients is O(chunk_tokens * V).

    Args:
        student_hidden_NH: ``[N, H]``, replicated over ``tp_group``; its gradient is the full one on every rank.
        student_weight_VH: ``[V, H]``, this rank's shard, of the dtype of the hidden states; its gradient is local.
        teacher_hidden_NG: ``[N, G]``, replicated; receives no gradient.
        teacher_weight_VG: ``[V, G]``, the same rows as the student's; receives no gradient.
        labels_N: ``[N]``, global vocabulary ids; any value where the mask is 0.
        mask_N: ``[N]``, weight of each token, 0 leaves it out.
        temperature: T above, > 0.
        chunk_tokens: Tokens whose logits exist at the same time.
        vocab_size: Entries of the vocabulary without padding, over all ranks.
        vocab_start: Global id of row 0 of the shard. Rows whose id is >= ``vocab_size`` are in no softmax and get
            zero gradient.
        tp_group: Ranks sharing the vocabulary; None when V is all of it.
    Returns:
        ``LinearKD``. Logits are multiplied in the input dtype, all else is float32, or float64 for float64 inputs.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    if temperature <= 0:
        raise ConfigError(f"distill.temperature={temperature} must be > 0; 1.0 is plain KL.")
    if student_weight_VH.shape[0] != teacher_weight_VG.shape[0]:
        raise ConfigError(
            f"student head rows={student_weight_VH.shape[0]} must equal teacher head rows={teacher_weight_VG.shape[0]}"
            "; pad both vocabularies to the same multiple."
        )
    if student_hidden_NH.shape[0] != teacher_hidden_NG.shape[0]:
        raise DataError(
            f"student tokens={student_hidden_NH.shape[0]} must equal teacher tokens={teacher_hidden_NG.shape[0]}"
            "; give both models the same batch."
        )
    _check(student_hidden_NH, labels_N, mask_N, chunk_tokens, vocab_size)
    sums = _LinearKD.apply(
        student_hidden_NH,
        student_weight_VH,
        teacher_hidden_NG,
        teacher_weight_VG,
        labels_N,
        mask_N,
        temperature,
        chunk_tokens,
        _Shard(vocab_size, vocab_start, tp_group),
        _wanted(student_hidden_NH, student_weight_VH),
    )
    return LinearKD(*sums)


def linear_ce_sum(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    mask_N: Tensor,
    *,
    chunk_tokens: int,
    vocab_size: int,
    vocab_start: int = 0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Summed language-model loss in nats, computed chunk by chunk together with its gradient.

    ``sum_n mask_n * (log sum_v exp(z_nv) - z_n,label)`` with ``z = hidden @ weight.T`` over the unpadded vocabulary;
    ``linear_kd`` at T = 1 with a teacher that is sure of the label. The gradient to the logits is
    ``mask_n * (softmax(z)_nv - [v = label_n])``.

    Args: as in ``linear_kd``, with the same gradients.
    Returns:
        Scalar, float32 or wider, equal on every rank of ``tp_group``.
    """
    _check(hidden_NH, labels_N, mask_N, chunk_tokens, vocab_size)
    shard = _Shard(vocab_size, vocab_start, tp_group)
    return _LinearCE.apply(hidden_NH, weight_VH, labels_N, mask_N, chunk_tokens, shard, _wanted(hidden_NH, weight_VH))


@torch.no_grad()
def linear_ce(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    mask_N: Tensor,
    *,
    chunk_tokens: int,
    vocab_size: int,
    vocab_start: int = 0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Per-token language-model loss in nats, without gradient.

    ``mask_n * (log sum_v exp(z_nv) - z_n,label)`` with ``z = hidden @ weight.T`` over the unpadded vocabulary.

    Args: as in ``linear_kd``.
    Returns:
        ``[N]``, float32 or wider, equal on every rank of ``tp_group``; neither summed nor averaged.
    """
    _check(hidden_NH, labels_N, mask_N, chunk_tokens, vocab_size)
    shard = _Shard(vocab_size, vocab_start, tp_group)
    out_N = torch.zeros(hidden_NH.shape[0], dtype=_wide(hidden_NH), device=hidden_NH.device)
    for rows in _chunks(hidden_NH.shape[0], chunk_tokens):
        _, ce_MN = _log_probs([_logits(hidden_NH[rows], weight_VH, shard)], labels_N[rows], 1.0, shard)
        out_N[rows] = ce_MN[0] * mask_N[rows]
    return out_N


class _Gradients:
    """Gradients to hidden states and head, added chunk by chunk from those to the logits."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, shard: _Shard, wanted: tuple[bool, bool]) -> None:
        self.hidden_NH, self.weight_VH, self.shard, self.are_wanted = hidden_NH, weight_VH, shard, any(wanted)
        self.to_hidden_NH = torch.zeros_like(hidden_NH) if wanted[0] else None
        self.to_weight_VH = torch.zeros_like(weight_VH, dtype=_wide(hidden_NH)) if wanted[1] else None

    def add(self, rows: slice, wide_NV: Tensor) -> None:
        num_valid = self.shard.num_valid(self.weight_VH)
        grad_NV = wide_NV.to(self.weight_VH.dtype)
        if self.to_hidden_NH is not None:
            # Each rank holds its columns' share of the sum over the vocabulary. Added here, once and in wide
            # dtype; nothing outside may reduce it again.
            share_NH = (grad_NV @ self.weight_VH[:num_valid]).to(wide_NV.dtype)
            self.to_hidden_NH[rows] = all_reduce_sum(share_NH, self.shard.tp_group).to(self.to_hidden_NH.dtype)
        if self.to_weight_VH is not None:
            self.to_weight_VH[:num_valid] += grad_NV.T @ self.hidden_NH[rows]

    def keep(self, ctx: Any) -> None:
        to_weight_VH = None if self.to_weight_VH is None else self.to_weight_VH.to(self.weight_VH.dtype)
        ctx.save_for_backward(self.to_hidden_NH, to_weight_VH)


def _scaled(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """What `_Gradients.keep` kept, times the gradient that arrives at the loss."""
    return [None if kept is None else kept * grad.to(kept.dtype) for kept in ctx.saved_tensors]


class _LinearKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_NH: Tensor,
        student_weight_VH: Tensor,
        teacher_hidden_NG: Tensor,
        teacher_weight_VG: Tensor,
        labels_N: Tensor,
        mask_N: Tensor,
        temperature: float,
        chunk_tokens: int,
        shard: _Shard,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _wide(student_hidden_NH)
        gradients = _Gradients(student_hidden_NH, student_weight_VH, shard, wanted)
        kd_sum = torch.zeros((), dtype=dtype, device=student_hidden_NH.device)
        ce_sum_M = torch.zeros(2, dtype=dtype, device=student_hidden_NH.device)
        for rows in _chunks(student_hidden_NH.shape[0], chunk_tokens):
            logits = [
                _logits(student_hidden_NH[rows], student_weight_VH, shard),
                _logits(teacher_hidden_NG[rows], teacher_weight_VG, shard).to(dtype),
            ]
            (log_q_NV, log_p_NV), ce_MN = _log_probs(logits, labels_N[rows], temperature, shard)
            weight_N1 = mask_N[rows].to(dtype)[:, None]
            ce_sum_M += (ce_MN * weight_N1[:, 0]).sum(dim=-1)
            p_NV = log_p_NV.exp()
            kd_sum += (log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(dim=-1, keepdim=True) * weight_N1).sum()
            if gradients.are_wanted:
                gradients.add(rows, log_q_NV.exp_().sub_(p_NV).mul_(temperature * weight_N1))
        kd_sum = temperature**2 * all_reduce_sum(kd_sum, shard.tp_group)
        gradients.keep(ctx)
        ce_sum, teacher_ce_sum = ce_sum_M.unbind()
        ce_sum, teacher_ce_sum = ce_sum.clone(), teacher_ce_sum.clone()
        ctx.mark_non_differentiable(ce_sum, teacher_ce_sum)
        return kd_sum, ce_sum, teacher_ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kd: Tensor, *_: Any) -> tuple[Any, ...]:
        return (*_scaled(ctx, grad_kd), *[None] * 8)


class _LinearCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        mask_N: Tensor,
        chunk_tokens: int,
        shard: _Shard,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        dtype = _wide(hidden_NH)
        gradients = _Gradients(hidden_NH, weight_VH, shard, wanted)
        ce_sum = torch.zeros((), dtype=dtype, device=hidden_NH.device)
        for rows in _chunks(hidden_NH.shape[0], chunk_tokens):
            (log_q_NV,), ce_MN = _log_probs([_logits(hidden_NH[rows], weight_VH, shard)], labels_N[rows], 1.0, shard)
            weight_N = mask_N[rows].to(dtype)
            ce_sum += (ce_MN[0] * weight_N).sum()
            if gradients.are_wanted:
                grad_NV = _minus_labels(log_q_NV.exp_(), labels_N[rows], shard.vocab_start)
                gradients.add(rows, grad_NV.mul_(weight_N[:, None]))
        gradients.keep(ctx)
        return ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor) -> tuple[Any, ...]:
        return (*_scaled(ctx, grad_ce), *[None] * 5)


def _check(hidden_NH: Tensor, labels_N: Tensor, mask_N: Tensor, chunk_tokens: int, vocab_size: int) -> None:
    if chunk_tokens <= 0:
        raise ConfigError(f"distill.chunk_tokens={chunk_tokens} must be > 0; try 512.")
    num = hidden_NH.shape[0]
    if labels_N.shape != (num,) or mask_N.shape != (num,):
        raise DataError(
            f"labels {tuple(labels_N.shape)} and mask {tuple(mask_N.shape)} must both be [{num}], one entry a token"
            "; flatten them as the hidden states."
        )
    # One wait for the device a call, against a loss that would be silently wrong.
    wrong_N = ((labels_N < 0) | (labels_N >= vocab_size)) & (mask_N != 0)
    if bool(wrong_N.any()):
        label = int(labels_N[wrong_N][0])
        raise DataError(f"label={label} must be in [0, {vocab_size}); mask the token or check the tokenizer.")


def _wanted(hidden_NH: Tensor, weight_VH: Tensor) -> tuple[bool, bool]:
    """Whether either input wants a gradient; read before the function, inside of which grad mode is always off."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden_NH.requires_grad, enabled and weight_VH.requires_grad


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens))


def _logits(hidden_NH: Tensor, weight_VH: Tensor, shard: _Shard) -> Tensor:
    """Unpadded logits of this shard in wide dtype, in memory of their own."""
    logits_NV = hidden_NH @ weight_VH[: shard.num_valid(weight_VH)].T
    return logits_NV.to(_wide(logits_NV))


def _log_probs(
    logits: list[Tensor], labels_N: Tensor, temperature: float, shard: _Shard
) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities at `temperature` of each model's shard `[N, V]`, and the loss at T = 1 `[M, N]`.

    Overwrites `logits`. All models share one maximum and one sum over the group.
    """
    max_MN = all_reduce_max(torch.stack([_row_max(logits_NV) for logits_NV in logits]), shard.tp_group)
    sums = []
    for logits_NV, max_N in zip(logits, max_MN, strict=True):
        plain_N = logits_NV.sub_(max_N[:, None]).exp().sum(dim=-1)
        label_N = _label_values(logits_NV, labels_N, shard.vocab_start)
        tempered_N = plain_N if temperature == 1 else logits_NV.div_(temperature).exp().sum(dim=-1)
        sums.append(torch.stack([plain_N, label_N, tempered_N]))
    plain_MN, label_MN, tempered_MN = all_reduce_sum(torch.stack(sums), shard.tp_group).unbind(dim=1)
    log_z_MN = tempered_MN.log()
    return [x_NV.sub_(z_N[:, None]) for x_NV, z_N in zip(logits, log_z_MN, strict=True)], plain_MN.log() - label_MN


def _row_max(logits_NV: Tensor) -> Tensor:
    if logits_NV.shape[-1] == 0:  # this rank holds padding only
        return logits_NV.new_full(logits_NV.shape[:1], -torch.inf)
    return logits_NV.amax(dim=-1)


def _label_values(logits_NV: Tensor, labels_N: Tensor, vocab_start: int) -> Tensor:
    """The label's entry where this shard holds it, else 0, so that the sum over ranks is the label's entry."""
    if logits_NV.shape[-1] == 0:
        return logits_NV.new_zeros(logits_NV.shape[:1])
    place_N1, held_N1 = _label_places(labels_N, vocab_start, logits_NV.shape[-1])
    return torch.where(held_N1, logits_NV.gather(-1, place_N1), 0)[:, 0]


def _minus_labels(probs_NV: Tensor, labels_N: Tensor, vocab_start: int) -> Tensor:
    """Subtracts 1 at the label's entry where this shard holds it; overwrites `probs_NV`."""
    if probs_NV.shape[-1] == 0:
        return probs_NV
    place_N1, held_N1 = _label_places(labels_N, vocab_start, probs_NV.shape[-1])
    return probs_NV.scatter_add_(-1, place_N1, -held_N1.to(probs_NV.dtype))


def _label_places(labels_N: Tensor, vocab_start: int, num_held: int) -> tuple[Tensor, Tensor]:
    """Column of each label in this shard (any column if it is not here), and whether it is here; both `[N, 1]`."""
    local_N1 = (labels_N - vocab_start)[:, None]
    return local_N1.clamp(0, num_held - 1), (local_N1 >= 0) & (local_N1 < num_held)
