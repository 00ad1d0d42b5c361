"""Logits compared in plain torch: the definition, and the way on a CPU. losses/fused.py has the same functions.

Every function takes logits in the dtype of their product and widens a block of tokens at a time. Where the objective
wants a gradient, the student's logits become it.

Shape suffixes: N tokens, V vocabulary rows of this rank, K stored entries, L losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compactlm_nemo.losses.logit_losses import BlockLosses, Comparison, Objective
from compactlm_nemo.losses.vocabulary import LogProbs, VocabShard, at_least_float32, cache_blocks
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum

if TYPE_CHECKING:
    from compactlm_nemo.losses.targets import TopK


def against_teacher(
    student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, objective: Objective
) -> Iterator[BlockLosses]:
    """Compare the student with a teacher's logits, by every loss."""
    dtype, shard = at_least_float32(student_NV), objective.shard
    for block in cache_blocks(student_NV, shard):
        logits = [student_NV[block].to(dtype), teacher_NV[block].to(dtype)]
        student, teacher = shard.log_probs(logits, labels_N[block], objective.temperature)
        values_LN, gradient_NV = _logit_losses(Comparison(student, teacher, shard.vocab_size), objective)
        teacher_ce_N = teacher.ce_N
        del logits, teacher  # their [N, V] have served, and the gradient of the cross entropy needs as much
        _write_gradient(student_NV[block], gradient_NV, student, labels_N[block], objective)
        yield BlockLosses(block, torch.cat([values_LN, student.ce_N[None], teacher_ce_N[None]]))


def against_nobody(student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
    """Take the student's language-model loss alone."""
    dtype, shard = at_least_float32(student_NV), objective.shard
    for block in cache_blocks(student_NV, shard):
        (student,) = shard.log_probs([student_NV[block].to(dtype)], labels_N[block], objective.temperature)
        _write_gradient(student_NV[block], None, student, labels_N[block], objective)
        yield BlockLosses(block, torch.stack([student.ce_N, torch.zeros_like(student.ce_N)]))


def against_top_k(student_NV: Tensor, targets: TopK, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
    """Compare the student with a teacher's likely tokens, by the KL of `TopK`."""
    losses, shard, dtype = objective.losses, objective.shard, at_least_float32(student_NV)
    for block in cache_blocks(student_NV, shard):
        (student,) = shard.log_probs([student_NV[block].to(dtype)], labels_N[block], 1.0)
        value_N, gradient_NV = _top_k_loss(student, targets.rows(block), objective)
        _write_gradient(student_NV[block], gradient_NV, student, labels_N[block], objective)
        values = [value_N] if losses else []
        yield BlockLosses(block, torch.stack([*values, student.ce_N, targets.ce_N[block].to(dtype)]))


def token_losses(logits_NV: Tensor, labels_N: Tensor, shard: VocabShard) -> Tensor:
    """Return ``[N]``, the language-model loss of each token in nats; NaN where the label is no entry."""
    dtype = at_least_float32(logits_NV)
    blocks = cache_blocks(logits_NV, shard)
    return torch.cat([shard.log_probs([logits_NV[rows].to(dtype)], labels_N[rows], 1.0)[0].ce_N for rows in blocks])


def likeliest(logits_NV: Tensor, labels_N: Tensor, shard: VocabShard, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `TopK` for a teacher's logits, which may be overwritten."""
    (teacher,) = shard.log_probs([logits_NV.to(at_least_float32(logits_NV))], labels_N, 1.0)
    values_NK, ids_NK = top_entries(teacher.log_prob_NV, shard, k)
    p_NV = teacher.prob_NV
    # Summed without the K entries: 1 minus their sum would cancel where the teacher is sure.
    rest_N = all_reduce_sum(shard.add_at(p_NV, ids_NK, -shard.at(p_NV, ids_NK)).sum(dim=-1), shard.tp_group)
    return ids_NK, values_NK.exp(), rest_N, teacher.ce_N


def top_entries(values_NV: Tensor, shard: VocabShard, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries over all ranks, largest first, and their global ids, both ``[N, K]``."""
    num_local = min(k, values_NV.shape[1])
    values_NK, columns_NK = values_NV.topk(num_local, dim=-1)
    ids_NK = columns_NK + shard.vocab_start
    if shard.tp_group is not None:
        missing = k - num_local  # a rank with fewer rows than k still gives k, which nobody picks
        values_NK = torch.nn.functional.pad(values_NK, (0, missing), value=-torch.inf)
        values_NK = all_gather(values_NK, shard.tp_group, dim=-1)
        ids_NK = all_gather(torch.nn.functional.pad(ids_NK, (0, missing)), shard.tp_group, dim=-1)
        largest = values_NK.topk(k, dim=-1)
        values_NK, ids_NK = largest.values, ids_NK.gather(-1, largest.indices)
    return values_NK, ids_NK


def add_product(sum_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor, is_first: bool) -> None:
    """Add ``grad.T @ hidden``, of a narrower dtype, to the sum; or write it where it is the first."""
    if is_first:
        sum_VH.copy_(grad_NV.T @ hidden_NH)
    else:
        sum_VH += grad_NV.T @ hidden_NH


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


def _top_k_loss(student: LogProbs, targets: TopK, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """Return ``[N]``, the KL of `TopK`, and the gradient of the objective's share of it."""
    shard, dtype, ids_NK = objective.shard, student.prob_NV.dtype, targets.ids_NK
    p_NK, p_rest_N = targets.probs_NK.to(dtype), targets.rest_N.to(dtype)
    q_NV, log_q_NK = student.prob_NV.clone(), shard.at(student.log_prob_NV, ids_NK)
    # The rest is summed without the K entries: 1 minus their sum would cancel where the student is sure.
    rest_NV = shard.add_at(q_NV, ids_NK, -shard.at(q_NV, ids_NK))
    sums = all_reduce_sum(torch.cat([log_q_NK, rest_NV.sum(dim=-1, keepdim=True)], dim=-1), shard.tp_group)
    log_q_NK, q_rest_N = sums[:, :-1], sums[:, -1].clamp(min=torch.finfo(dtype).tiny)
    gradient_NV, weight = None, objective.losses["forward_kl"][0] if objective.losses else 0.0
    if objective.with_gradient and weight:
        gradient_NV = rest_NV.mul_(1 - (p_rest_N / q_rest_N)[:, None])
        shard.add_at(gradient_NV, ids_NK, log_q_NK.exp() - p_NK).mul_(weight)
    return targets.divergence(log_q_NK, q_rest_N), gradient_NV


def _write_gradient(
    student_NV: Tensor, gradient_NV: Tensor | None, student: LogProbs, labels_N: Tensor, objective: Objective
) -> None:
    """Write the losses' gradient and that of the cross entropy over the logits; overwrites `gradient_NV`."""
    if not objective.with_gradient:
        return
    if objective.ce_weight:
        ce_gradient_NV = objective.shard.ce_gradient(student, labels_N, objective.temperature).mul_(objective.ce_weight)
        gradient_NV = ce_gradient_NV if gradient_NV is None else gradient_NV.add_(ce_gradient_NV)
    assert gradient_NV is not None  # LossConfig demands a weight
    student_NV.copy_(gradient_NV)
