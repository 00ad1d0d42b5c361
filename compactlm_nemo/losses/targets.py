"""What the student is compared with: a teacher's hidden states and head, or stored probabilities of likely tokens.

Both give, for a chunk of tokens, the value of every loss and the gradient of their sum to the student's logits.

Shape suffixes: N tokens, V vocabulary rows of this rank, G teacher width, K stored entries, L losses.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compactlm_nemo.losses.logit_losses import LogitLoss, Pair
from compactlm_nemo.losses.vocabulary import LogProbs, VocabShard, chunks
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum

Losses = dict[str, tuple[float, LogitLoss]]
"""Name -> weight and loss."""


class Comparison(NamedTuple):
    """A chunk of tokens compared with the teacher."""

    student: LogProbs
    values_LN: Tensor
    """Each loss, with the factor T**2."""
    teacher_ce_N: Tensor
    """Teacher's language-model loss at T = 1."""
    gradient_NV: Tensor | None
    """Of the weighted sum of `values_LN` to the student's logits."""


class Compare(Protocol):
    """The comparison of one chunk, a block of its tokens at a time."""

    def __call__(self, student_logits_NV: Tensor, labels_N: Tensor, block: slice) -> Comparison:
        """Logits and labels of the block, which stay as they are; `block` says which tokens of the chunk they are."""


class HeadSettings(NamedTuple):
    """What a comparison needs to know beside the tokens."""

    losses: Losses
    temperature: float
    shard: VocabShard
    with_gradient: bool


class Targets(Protocol):
    """A source of targets for N tokens."""

    @property
    def num_tokens(self) -> int:
        """N."""

    def chunk(self, rows: slice, settings: HeadSettings) -> Compare:
        """How the tokens `rows` are compared."""


class TeacherHead(NamedTuple):
    """A teacher that is there: its final normed hidden states and its output weights."""

    hidden_NG: Tensor
    """``[N, G]``, replicated over tensor-parallel ranks."""
    weight_VG: Tensor
    """``[V, G]``, the same rows as the student's."""

    @property
    def num_tokens(self) -> int:
        return self.hidden_NG.shape[0]

    def chunk(self, rows: slice, settings: HeadSettings) -> Compare:
        teacher_NV = settings.shard.logits(self.hidden_NG[rows], self.weight_VG)

        def compare(student_logits_NV: Tensor, labels_N: Tensor, block: slice) -> Comparison:
            return _compare(student_logits_NV, teacher_NV[block].to(student_logits_NV.dtype), labels_N, settings)

        return compare


def _compare(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, settings: HeadSettings) -> Comparison:
    losses, temperature, shard, with_gradient = settings
    student, teacher = shard.log_probs([student_NV, teacher_NV], labels_N, temperature)
    pair = Pair(
        student.log_prob_NV, teacher.log_prob_NV, student.prob_NV, teacher.prob_NV,
        student.shift_N1, teacher.shift_N1, vocab_size=shard.vocab_size,
    )  # fmt: skip
    own = [loss.sums(pair) for _, loss in losses.values()]
    nothing_KN = student_NV.new_zeros(0, len(labels_N))
    totals_KN = all_reduce_sum(torch.cat([*own, nothing_KN]), shard.tp_group)
    totals = totals_KN.split([len(sums_KN) for sums_KN in own]) if own else []
    gradient_NV, values = None, [nothing_KN]
    for (weight, loss), sums_KN in zip(losses.values(), totals, strict=True):
        values.append(loss.value(sums_KN)[None] * temperature**2)
        if with_gradient:
            own_NV = loss.gradient(pair, sums_KN)
            if weight * temperature != 1:
                own_NV.mul_(weight * temperature)
            gradient_NV = own_NV if gradient_NV is None else gradient_NV.add_(own_NV)
    return Comparison(student, torch.cat(values), teacher.ce_N, gradient_NV)


class NoTargets(NamedTuple):
    """Nobody to compare with: cross entropy alone."""

    num_tokens: int

    def chunk(self, rows: slice, settings: HeadSettings) -> Compare:
        assert not settings.losses  # settings are checked before the start

        def compare(student_logits_NV: Tensor, labels_N: Tensor, block: slice) -> Comparison:
            (student,) = settings.shard.log_probs([student_logits_NV], labels_N, settings.temperature)
            nothing_LN = student_logits_NV.new_zeros(0, len(labels_N))
            return Comparison(student, nothing_LN, torch.zeros_like(student.ce_N), None)

        return compare


class TopK(NamedTuple):
    """A teacher's K likeliest tokens, of which the rest of the vocabulary is one more outcome.

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

    def chunk(self, rows: slice, settings: HeadSettings) -> Compare:
        own = TopK(*(field[rows] for field in self))

        def compare(student_logits_NV: Tensor, labels_N: Tensor, block: slice) -> Comparison:
            return _compare_top_k(student_logits_NV, TopK(*(field[block] for field in own)), labels_N, settings)

        return compare


def _compare_top_k(student_NV: Tensor, targets: TopK, labels_N: Tensor, settings: HeadSettings) -> Comparison:
    losses, _, shard, with_gradient = settings
    (student,) = shard.log_probs([student_NV], labels_N, 1.0)
    dtype = student_NV.dtype
    ids_NK, p_NK, p_rest_N = targets.ids_NK, targets.probs_NK.to(dtype), targets.rest_N.to(dtype)
    q_NV, log_q_NK = student.prob_NV.clone(), shard.at(student.log_prob_NV, ids_NK)
    # The rest is summed without the K entries: 1 minus their sum would cancel where the student is sure.
    rest_NV = shard.add_at(q_NV, ids_NK, -shard.at(q_NV, ids_NK))
    sums = all_reduce_sum(torch.cat([log_q_NK, rest_NV.sum(dim=-1, keepdim=True)], dim=-1), shard.tp_group)
    log_q_NK, q_rest_N = sums[:, :-1], sums[:, -1].clamp(min=torch.finfo(dtype).tiny)
    value_N = (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(dim=-1) + torch.xlogy(p_rest_N, p_rest_N / q_rest_N)
    gradient_NV, weight = None, losses["forward_kl"][0] if losses else 0.0
    if with_gradient and weight:
        gradient_NV = rest_NV.mul_(1 - (p_rest_N / q_rest_N)[:, None])
        shard.add_at(gradient_NV, ids_NK, log_q_NK.exp() - p_NK).mul_(weight)
    values_LN = value_N[None] if losses else value_N.new_zeros(0, len(value_N))
    return Comparison(student, values_LN, targets.ce_N.to(dtype), gradient_NV)


@torch.no_grad()
def top_k_targets(
    hidden_NG: Tensor, weight_VG: Tensor, labels_N: Tensor, *, k: int, chunk_tokens: int, shard: VocabShard
) -> TopK:
    """The k likeliest tokens of each position, likeliest first, and the probability of all others.

    Args:
        hidden_NG: ``[N, G]``, replicated over ``shard.tp_group``.
        weight_VG: ``[V, G]``, this rank's rows.
        labels_N: ``[N]``, global ids, for the teacher's language-model loss.
        k: Entries kept, at most the vocabulary.
        chunk_tokens: Tokens whose logits exist at the same time.
    Returns:
        ``TopK`` at temperature 1, equal on every rank of the group.
    """
    parts = [
        _chunk(hidden_NG[rows], weight_VG, labels_N[rows], k, shard) for rows in chunks(len(hidden_NG), chunk_tokens)
    ]
    return TopK(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _chunk(hidden_NG: Tensor, weight_VG: Tensor, labels_N: Tensor, k: int, shard: VocabShard) -> TopK:
    (teacher,) = shard.log_probs([shard.logits(hidden_NG, weight_VG)], labels_N, 1.0)
    log_p_NV = teacher.log_prob_NV
    own = min(k, log_p_NV.shape[1])
    found = log_p_NV.topk(own, dim=-1)
    values_NK, ids_NK = found.values, found.indices + shard.vocab_start
    if shard.tp_group is not None:
        missing = k - own  # a rank with fewer rows than k still gives k, which nobody picks
        values_NK = torch.nn.functional.pad(values_NK, (0, missing), value=-torch.inf)
        values_NK = all_gather(values_NK, shard.tp_group, dim=-1)
        ids_NK = all_gather(torch.nn.functional.pad(ids_NK, (0, missing)), shard.tp_group, dim=-1)
        best = values_NK.topk(k, dim=-1)
        values_NK, ids_NK = best.values, ids_NK.gather(-1, best.indices)
    p_NV = teacher.prob_NV
    # Summed without the K entries: 1 minus their sum would cancel where the teacher is sure.
    rest_N = all_reduce_sum(shard.add_at(p_NV, ids_NK, -shard.at(p_NV, ids_NK)).sum(dim=-1), shard.tp_group)
    return TopK(ids_NK, values_NK.exp(), rest_N, teacher.ce_N)
