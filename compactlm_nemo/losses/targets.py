"""Targets are what the student is compared with: a teacher's hidden states and head, or stored likely tokens.

All of them give, for a chunk of tokens, the value of every loss and the gradient of their weighted sum to the student's
logits.

Shape suffixes: N tokens, V vocabulary rows of this rank, G teacher width, K stored entries, L losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compactlm_nemo.losses.logit_losses import Comparison, LogitLoss
from compactlm_nemo.losses.vocabulary import Head, LogProbs, VocabShard, cache_blocks, token_chunks
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum


class BlockLosses(NamedTuple):
    """`BlockLosses` are the losses of some tokens of a chunk."""

    block: slice
    """Which tokens of the chunk these are."""
    values_LN: Tensor
    """``[L + 2, N]``: each loss with the factor T**2, then both models' language-model losses at T = 1."""
    gradient_NV: Tensor | None
    """Gradient of the objective to the student's logits; None where the objective is without one."""


class Objective(NamedTuple):
    """An objective is the weighted sum of losses to be made less, with all that is equal for every token."""

    losses: dict[str, tuple[float, LogitLoss]]
    """Name -> weight and loss, as `weighted_losses` gives."""
    ce_weight: float
    """Weight of the student's language-model loss."""
    temperature: float
    shard: VocabShard
    with_gradient: bool
    """Whether the gradient is wanted beside the values."""

    def block_losses(
        self,
        block: slice,
        student: LogProbs,
        labels_N: Tensor,
        values_LN: Tensor,
        teacher_ce_N: Tensor,
        gradient_NV: Tensor | None,
    ) -> BlockLosses:
        """Add both language-model losses to the losses and the gradient of a comparison; overwrites `gradient_NV`."""
        if self.with_gradient and self.ce_weight:
            ce_gradient_NV = self.shard.ce_gradient(student, labels_N, self.temperature).mul_(self.ce_weight)
            gradient_NV = ce_gradient_NV if gradient_NV is None else gradient_NV.add_(ce_gradient_NV)
        return BlockLosses(block, torch.cat([values_LN, student.ce_N[None], teacher_ce_N[None]]), gradient_NV)


class Targets(Protocol):
    """`Targets` are what the student is compared with, for N tokens."""

    @property
    def num_tokens(self) -> int:
        """N."""

    def compare(self, rows: slice, student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
        """Compare the tokens `rows` with their student logits, a block of tokens at a time.

        Logits and labels stay as they are; the caller may overwrite the logits of a block that has been yielded.
        """


class TeacherHead(NamedTuple):
    """A `TeacherHead` is a teacher that is there: its final normed hidden states and its output weights."""

    hidden_NG: Tensor
    """``[N, G]``, replicated over tensor-parallel ranks."""
    weight_VG: Tensor
    """``[V, G]``, of the vocabulary rows of the student's head."""

    @property
    def num_tokens(self) -> int:
        return self.hidden_NG.shape[0]

    def compare(self, rows: slice, student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
        # One product a chunk, not one a block, which would read all of the head for a few tokens.
        teacher_NV = objective.shard.logits(self.hidden_NG[rows], self.weight_VG)
        for block in cache_blocks(student_NV, objective.shard):
            teacher_logits_NV = teacher_NV[block].to(student_NV.dtype)
            yield _compare_logits(block, student_NV[block], teacher_logits_NV, labels_N[block], objective)


def _compare_logits(
    block: slice, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, objective: Objective
) -> BlockLosses:
    shard = objective.shard
    student, teacher = shard.log_probs([student_NV, teacher_NV], labels_N, objective.temperature)
    values_LN, gradient_NV = _logit_losses(Comparison(student, teacher, shard.vocab_size), objective)
    teacher_ce_N = teacher.ce_N
    del teacher  # its [N, V] have served, and the gradient of the cross entropy needs as much
    return objective.block_losses(block, student, labels_N, values_LN, teacher_ce_N, gradient_NV)


def _logit_losses(both: Comparison, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """Return ``[L, N]``, the value of every loss with the factor T**2, and the gradient of their weighted sum."""
    losses, temperature = objective.losses, objective.temperature
    no_loss_KN = both.student.ce_N.new_zeros(0, len(both.student.ce_N))
    shard_sums = [loss.sums(both) for _, loss in losses.values()]
    totals_KN = all_reduce_sum(torch.cat([*shard_sums, no_loss_KN]), objective.shard.tp_group)
    totals = totals_KN.split([len(sums_KN) for sums_KN in shard_sums]) if losses else ()
    values, gradient_NV = [no_loss_KN], None
    for (weight, loss), sums_KN in zip(losses.values(), totals, strict=True):
        values.append(loss.value(sums_KN)[None] * temperature**2)
        if objective.with_gradient:
            loss_gradient_NV = loss.gradient(both, sums_KN)
            if weight * temperature != 1:
                loss_gradient_NV.mul_(weight * temperature)
            gradient_NV = loss_gradient_NV if gradient_NV is None else gradient_NV.add_(loss_gradient_NV)
    return torch.cat(values), gradient_NV


class NoTargets(NamedTuple):
    """`NoTargets` compare the student with nobody: its language-model loss alone counts."""

    num_tokens: int

    def compare(self, rows: slice, student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
        assert not objective.losses  # settings are checked before the start
        for block in cache_blocks(student_NV, objective.shard):
            (student,) = objective.shard.log_probs([student_NV[block]], labels_N[block], objective.temperature)
            no_loss_LN = student_NV.new_zeros(0, len(student.ce_N))
            no_teacher_N = torch.zeros_like(student.ce_N)
            yield objective.block_losses(block, student, labels_N[block], no_loss_LN, no_teacher_N, None)


class TopK(NamedTuple):
    """`TopK` holds a teacher's K likeliest tokens; the rest of the vocabulary is one more outcome.

    ``KL = sum_{v in K} p_v (log p_v - log q_v) + p_r (log p_r - log q_r)`` with ``p_r = 1 - sum_{v in K} p_v`` and
    ``q_r`` the student's probability outside of K: a proper divergence over K + 1 outcomes, never above the KL over the
    vocabulary. Its gradient to the logits is ``q_v - p_v`` in K and ``q_v (1 - p_r / q_r)`` outside. T must be 1.
    """

    ids_NK: Tensor
    """``[N, K]`` int64, distinct in each row."""
    probs_NK: Tensor
    """``[N, K]``, of the softmax over the vocabulary."""
    rest_N: Tensor
    """``[N]``, the probability of the rest."""
    ce_N: Tensor
    """``[N]``, the teacher's language-model loss."""

    @property
    def num_tokens(self) -> int:
        return self.ids_NK.shape[0]

    def compare(self, rows: slice, student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
        chunk = TopK(*(field[rows] for field in self))
        for block in cache_blocks(student_NV, objective.shard):
            targets = TopK(*(field[block] for field in chunk))
            yield _compare_top_k(block, student_NV[block], targets, labels_N[block], objective)


def _compare_top_k(
    block: slice, student_NV: Tensor, targets: TopK, labels_N: Tensor, objective: Objective
) -> BlockLosses:
    losses, shard, dtype = objective.losses, objective.shard, student_NV.dtype
    (student,) = shard.log_probs([student_NV], labels_N, 1.0)
    ids_NK, p_NK, p_rest_N = targets.ids_NK, targets.probs_NK.to(dtype), targets.rest_N.to(dtype)
    q_NV, log_q_NK = student.prob_NV.clone(), shard.at(student.log_prob_NV, ids_NK)
    # The rest is summed without the K entries: 1 minus their sum would cancel where the student is sure.
    rest_NV = shard.add_at(q_NV, ids_NK, -shard.at(q_NV, ids_NK))
    sums = all_reduce_sum(torch.cat([log_q_NK, rest_NV.sum(dim=-1, keepdim=True)], dim=-1), shard.tp_group)
    log_q_NK, q_rest_N = sums[:, :-1], sums[:, -1].clamp(min=torch.finfo(dtype).tiny)
    value_N = (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(dim=-1) + torch.xlogy(p_rest_N, p_rest_N / q_rest_N)
    gradient_NV, weight = None, losses["forward_kl"][0] if losses else 0.0
    if objective.with_gradient and weight:
        gradient_NV = rest_NV.mul_(1 - (p_rest_N / q_rest_N)[:, None])
        shard.add_at(gradient_NV, ids_NK, log_q_NK.exp() - p_NK).mul_(weight)
    values_LN = value_N[None] if losses else value_N.new_zeros(0, len(value_N))
    return objective.block_losses(block, student, labels_N, values_LN, targets.ce_N.to(dtype), gradient_NV)


@torch.no_grad()
def top_k_targets(hidden_NG: Tensor, head: Head, labels_N: Tensor, *, k: int) -> TopK:
    """Return the k likeliest tokens of each position, likeliest first, and the probability of all others.

    Args:
        hidden_NG: ``[N, G]``, replicated over the ranks that share the vocabulary.
        head: The teacher's.
        labels_N: ``[N]``, global ids, for the teacher's language-model loss.
        k: Entries kept, at most the vocabulary.
    Returns:
        ``TopK`` at temperature 1, equal on every rank of the group.
    """
    chunks = token_chunks(len(hidden_NG), head.chunk_tokens)
    parts = [_top_k_of_chunk(hidden_NG[rows], head, labels_N[rows], k) for rows in chunks]
    return TopK(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _top_k_of_chunk(hidden_NG: Tensor, head: Head, labels_N: Tensor, k: int) -> TopK:
    shard = head.shard
    (teacher,) = shard.log_probs([head.logits(hidden_NG)], labels_N, 1.0)
    num_local = min(k, teacher.log_prob_NV.shape[1])
    values_NK, columns_NK = teacher.log_prob_NV.topk(num_local, dim=-1)
    ids_NK = columns_NK + shard.vocab_start
    if shard.tp_group is not None:
        missing = k - num_local  # a rank with fewer rows than k still gives k, which nobody picks
        values_NK = torch.nn.functional.pad(values_NK, (0, missing), value=-torch.inf)
        values_NK = all_gather(values_NK, shard.tp_group, dim=-1)
        ids_NK = all_gather(torch.nn.functional.pad(ids_NK, (0, missing)), shard.tp_group, dim=-1)
        likeliest = values_NK.topk(k, dim=-1)
        values_NK, ids_NK = likeliest.values, ids_NK.gather(-1, likeliest.indices)
    p_NV = teacher.prob_NV
    # Summed without the K entries: 1 minus their sum would cancel where the teacher is sure.
    rest_N = all_reduce_sum(shard.add_at(p_NV, ids_NK, -shard.at(p_NV, ids_NK)).sum(dim=-1), shard.tp_group)
    return TopK(ids_NK, values_NK.exp(), rest_N, teacher.ce_N)
