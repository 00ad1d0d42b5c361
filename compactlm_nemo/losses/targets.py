"""Targets are what the student is compared with: a teacher's hidden states and head, or stored likely tokens.

All of them give, for a chunk of tokens, the value of every loss and the gradient of their weighted sum to the student's
logits.

Shape suffixes: N tokens, V vocabulary rows of this rank, H student width, G teacher width, K stored entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compactlm_nemo.losses import plain
from compactlm_nemo.losses.logit_losses import BlockLosses, Objective
from compactlm_nemo.losses.vocabulary import Head, VocabShard, token_chunks


class LogitArithmetic(Protocol):
    """`LogitArithmetic` is what losses/plain.py and losses/fused.py both do; plain.py says what they give."""

    def against_teacher(
        self, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, objective: Objective
    ) -> Iterator[BlockLosses]: ...

    def against_nobody(self, student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]: ...

    def against_top_k(
        self, student_NV: Tensor, targets: TopK, labels_N: Tensor, objective: Objective
    ) -> Iterator[BlockLosses]: ...

    def token_losses(self, logits_NV: Tensor, labels_N: Tensor, shard: VocabShard) -> Tensor: ...

    def likeliest(
        self, logits_NV: Tensor, labels_N: Tensor, shard: VocabShard, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def add_product(self, sum_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor, is_first: bool) -> None: ...


def logit_arithmetic(fused: bool) -> LogitArithmetic:
    """Return the kernels, or the same in plain torch; here alone Triton is needed, which torch brings for CUDA."""
    if not fused:
        return plain
    from compactlm_nemo.losses import fused as kernels

    return kernels


class Targets(Protocol):
    """`Targets` are what the student is compared with, for N tokens."""

    @property
    def num_tokens(self) -> int:
        """N."""

    def compare(self, rows: slice, student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
        """Compare the tokens `rows` with their student logits, a block of tokens at a time.

        Where the objective has a gradient, it overwrites the logits; otherwise nobody reads them again.
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
        return logit_arithmetic(objective.fused).against_teacher(student_NV, teacher_NV, labels_N, objective)


class NoTargets(NamedTuple):
    """`NoTargets` compare the student with nobody: its language-model loss alone counts."""

    num_tokens: int

    def compare(self, rows: slice, student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
        assert not objective.losses  # settings are checked before the start
        return logit_arithmetic(objective.fused).against_nobody(student_NV, labels_N, objective)


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

    def rows(self, rows: slice) -> TopK:
        """Return the targets of some tokens."""
        return TopK(*(field[rows] for field in self))

    def divergence(self, log_q_NK: Tensor, q_rest_N: Tensor) -> Tensor:
        """Return ``[N]``, the KL above, in the dtype of the student's probabilities."""
        p_NK, p_rest_N = self.probs_NK.to(log_q_NK.dtype), self.rest_N.to(q_rest_N.dtype)
        kept_N = (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(dim=-1)
        return kept_N + torch.xlogy(p_rest_N, p_rest_N / q_rest_N)

    def compare(self, rows: slice, student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
        return logit_arithmetic(objective.fused).against_top_k(student_NV, self.rows(rows), labels_N, objective)


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
    arithmetic = logit_arithmetic(head.is_fused(hidden_NG))
    parts = [
        arithmetic.likeliest(head.logits(hidden_NG[rows]), labels_N[rows], head.shard, k)
        for rows in token_chunks(len(hidden_NG), head.chunk_tokens)
    ]
    return TopK(*(torch.cat(field) for field in zip(*parts, strict=True)))
