"""Logits compared by kernels: the way on a GPU, with the functions of losses/plain.py, which is the definition.

The kernels of losses/kernels.py read both models' logits once and give, for each token, its maximum and the sums that
the losses need; the ranks that share the vocabulary add up those few numbers; then the kernels read the logits again
and write the gradient over the student's. The two losses of a mixture need one pass more between these.

Bytes read and written for a vocabulary entry of a token, with logits of b bytes, 2 in bf16: 5 b beside a teacher that
is there, 7 b with a mixture, 3 b without one or with stored tokens; without gradient 2 b, 4 b and b. Plain torch moves
about 150.

Shape suffixes: N tokens, V vocabulary rows of this rank, M models, S statistics, C coefficients, K stored entries or
sums of a loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compactlm_nemo.losses import kernels
from compactlm_nemo.losses.logit_losses import BlockLosses, JensenShannon, Objective, SkewedKL
from compactlm_nemo.losses.plain import top_entries
from compactlm_nemo.losses.vocabulary import VocabShard
from compactlm_nemo.parallel.collectives import all_reduce_max, all_reduce_sum

if TYPE_CHECKING:
    from compactlm_nemo.losses.targets import TopK

NO_WEIGHTS = [0.0] * len(kernels.LOSSES)


EVERYTHING = slice(None)
"""A chunk is one block: every step is a kernel's start, and with other ranks a message."""


def against_teacher(
    student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, objective: Objective
) -> Iterator[BlockLosses]:
    """Compare the student with a teacher's logits, by every loss."""
    comparison = _Comparison(student_NV, teacher_NV, labels_N, objective)
    sums = comparison.sums()
    values = [loss.value(sums[name]) * objective.temperature**2 for name, (_, loss) in objective.losses.items()]
    if objective.with_gradient:
        comparison.write_gradient(sums)
    yield BlockLosses(EVERYTHING, torch.stack([*values, *comparison.softmax.ce_MN]))


def against_nobody(student_NV: Tensor, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
    """Take the student's language-model loss alone."""
    softmax = _reduced([student_NV], labels_N, objective.shard, 1.0, NO_WEIGHTS)
    if objective.with_gradient:
        weight_N = torch.full_like(softmax.ce_MN[0], objective.ce_weight)
        coefficient_NC = torch.stack([softmax.top_MN[0], softmax.log_plain_MN[0], weight_N], dim=-1)
        _write_plain_gradient(student_NV, coefficient_NC, labels_N, objective)
    yield BlockLosses(EVERYTHING, torch.stack([softmax.ce_MN[0], torch.zeros_like(softmax.ce_MN[0])]))


def against_top_k(student_NV: Tensor, targets: TopK, labels_N: Tensor, objective: Objective) -> Iterator[BlockLosses]:
    """Compare the student with a teacher's likely tokens, by the KL of `TopK`; the logits serve as working memory."""
    shard, ids_NK, is_label_NK = objective.shard, targets.ids_NK, targets.ids_NK == labels_N[:, None]
    z_NK = _everywhere(student_NV, ids_NK, shard)
    label_N = _everywhere(student_NV, labels_N[:, None], shard)[:, 0]
    top_N, sum_N, sum_rest_N = _sums_without(student_NV, ids_NK, z_NK, shard)
    log_sum_N = sum_N.log()
    log_q_NK = z_NK - top_N[:, None] - log_sum_N[:, None]
    q_rest_N = (sum_rest_N / sum_N).clamp(min=torch.finfo(sum_N.dtype).tiny)
    weight, ce_weight = objective.losses["forward_kl"][0] if objective.losses else 0.0, objective.ce_weight
    if objective.with_gradient:
        # The kernel takes what is outside of K. There the logits of K are -inf, so that it makes them 0.
        factor_N = ce_weight + weight * (1 - targets.rest_N.to(q_rest_N.dtype) / q_rest_N)
        outside_N = torch.where(is_label_NK.any(dim=-1), -1, labels_N)
        _write_plain_gradient(student_NV, torch.stack([top_N, log_sum_N, factor_N], dim=-1), outside_N, objective)
        q_NK = log_q_NK.exp()
        inside_NK = weight * (q_NK - targets.probs_NK.to(q_NK.dtype)) + ce_weight * (q_NK - is_label_NK.to(q_NK.dtype))
        shard.add_at(student_NV, ids_NK, inside_NK)
    values = [targets.divergence(log_q_NK, q_rest_N)] if objective.losses else []
    ce_N = _cross_entropy(labels_N, label_N - top_N, log_sum_N, shard)
    yield BlockLosses(EVERYTHING, torch.stack([*values, ce_N, targets.ce_N.to(ce_N.dtype)]))


def token_losses(logits_NV: Tensor, labels_N: Tensor, shard: VocabShard) -> Tensor:
    """Return ``[N]``, the language-model loss of each token in nats; NaN where the label is no entry."""
    return _reduced([logits_NV], labels_N, shard, 1.0, NO_WEIGHTS).ce_MN[0]


def likeliest(logits_NV: Tensor, labels_N: Tensor, shard: VocabShard, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `TopK` for a teacher's logits, which serve as working memory."""
    values_NK, ids_NK = top_entries(logits_NV, shard, k)
    z_NK, label_N = values_NK.float(), _everywhere(logits_NV, labels_N[:, None], shard)[:, 0]
    top_N, sum_N, sum_rest_N = _sums_without(logits_NV, ids_NK, z_NK, shard)
    log_sum_N = sum_N.log()
    ce_N = _cross_entropy(labels_N, label_N - top_N, log_sum_N, shard)
    return ids_NK, (z_NK - top_N[:, None] - log_sum_N[:, None]).exp(), sum_rest_N / sum_N, ce_N


def add_product(sum_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor, is_first: bool) -> None:
    """Add ``grad.T @ hidden`` to the float32 sum, by one matrix product that reads and writes the sum where it can."""
    kernels.add_product(sum_VH, grad_NV, hidden_NH, is_first)


class _Softmaxes(NamedTuple):
    """`_Softmaxes` are the sums of a chunk over the vocabulary of all ranks, for the student and perhaps a teacher."""

    top_MN: Tensor
    """Largest logit."""
    sum_MN: Tensor
    """``sum_v exp((z_v - top) / T)``."""
    log_plain_MN: Tensor
    """Logarithm of that sum at T = 1."""
    ce_MN: Tensor
    """Language-model losses at T = 1, in nats."""
    dots_KN: Tensor
    """The last six columns of `kernels.statistics`, the first two relative to ``top``; none without a teacher."""


def _reduced(
    logits: list[Tensor], labels_N: Tensor, shard: VocabShard, temperature: float, weights: list[float]
) -> _Softmaxes:
    """Return the sums of every model: one pass over the logits, one maximum and one sum over the ranks."""
    num = len(logits)
    local_SN = kernels.statistics(logits[0], logits[1] if num == 2 else None, temperature, weights).T
    local_top_MN = local_SN[: 3 * num : 3]
    top_MN = all_reduce_max(local_top_MN, shard.tp_group)
    shift_MN = local_top_MN - top_MN  # -inf where this rank holds padding only, and all of its sums are 0
    scale_MN = (shift_MN / temperature).exp()
    sum_MN, plain_MN = local_SN[1 : 3 * num : 3] * scale_MN, local_SN[2 : 3 * num : 3] * shift_MN.exp()
    label_MN = torch.stack([shard.at(each_NV, labels_N[:, None])[:, 0].float() for each_NV in logits])
    dots_KN = local_SN[3 * num :].clone()
    if num == 2:
        dots_KN[:2] *= scale_MN.flip(0)  # the forward KL's is a sum over the teacher, the reverse KL's over the student
    totals = all_reduce_sum(torch.cat([sum_MN, plain_MN, label_MN, dots_KN]), shard.tp_group)
    sum_MN, plain_MN, label_MN, dots_KN = totals.split([num, num, num, len(dots_KN)])
    log_plain_MN = plain_MN.log()
    ce_MN = _cross_entropy(labels_N, label_MN - top_MN, log_plain_MN, shard)
    return _Softmaxes(top_MN, sum_MN, log_plain_MN, ce_MN, dots_KN)


class _Comparison:
    """A `_Comparison` holds a chunk's logits of both models, and the numbers of each token that losses share."""

    def __init__(self, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, objective: Objective) -> None:
        assert set(objective.losses) <= set(kernels.LOSSES), "a loss without a kernel"
        self.student_NV, self.teacher_NV, self.labels_N, self.objective = student_NV, teacher_NV, labels_N, objective
        weights = {name: weight for name, (weight, _) in objective.losses.items()}
        self.weights = [weights.get(name, 0.0) for name in kernels.LOSSES]
        losses = [loss for _, loss in objective.losses.values()]
        self.beta = next((loss.beta for loss in losses if isinstance(loss, JensenShannon)), 0.5)
        self.alpha = next((loss.alpha for loss in losses if isinstance(loss, SkewedKL)), 0.5)
        self.logs = [
            math.log(self.beta), math.log1p(-self.beta),
            math.log(self.alpha) if self.alpha else -math.inf, math.log1p(-self.alpha),
        ]  # fmt: skip
        temperature = objective.temperature
        self.softmax = _reduced([student_NV, teacher_NV], labels_N, objective.shard, temperature, self.weights)
        self.log_sum_MN = self.softmax.sum_MN.log()

    def sums(self) -> dict[str, Tensor]:
        """Return ``[K, N]`` for every loss by its name: the sums that the steps of `LogitLoss` take."""
        top_MN, sum_MN, dots_KN = self.softmax.top_MN, self.softmax.sum_MN, self.softmax.dots_KN
        # log q - log p is x - y minus this.
        gap_N = (top_MN[0] - top_MN[1]) / self.objective.temperature + (self.log_sum_MN[0] - self.log_sum_MN[1])
        sums = {
            "forward_kl": (dots_KN[0] / sum_MN[1] + gap_N)[None],
            "reverse_kl": (dots_KN[1] / sum_MN[0] - gap_N)[None],
            "mse": dots_KN[2:3] / self.objective.shard.vocab_size,
            "cosine": dots_KN[3:],
        }
        if {"jsd", "skewed_kl"} & self.objective.losses.keys():
            shift_NC = torch.stack([top_MN[0], self.log_sum_MN[0], top_MN[1], self.log_sum_MN[1]], dim=-1)
            local_NS = kernels.mixtures(
                self.student_NV, self.teacher_NV, shift_NC, self.objective.temperature, self.logs, self.weights
            )
            teacher_N, student_N, skewed_N, pull_N = all_reduce_sum(local_NS.T, self.objective.shard.tp_group)
            sums["jsd"] = torch.stack([self.beta * teacher_N, (1 - self.beta) * student_N])
            sums["skewed_kl"] = torch.stack([skewed_N, (1 - self.alpha) * pull_N])
        return sums

    def write_gradient(self, sums: dict[str, Tensor]) -> None:
        """Write the gradient of the objective over the student's logits."""
        objective, top_MN, zero_N = self.objective, self.softmax.top_MN, torch.zeros_like(self.softmax.ce_MN[0])
        forward, reverse, jsd, skewed, mse, cosine = self.weights
        columns = [
            top_MN[0], self.softmax.log_plain_MN[0], zero_N + objective.ce_weight,
            self.log_sum_MN[0], top_MN[1], self.log_sum_MN[1], self.softmax.dots_KN[1] / self.softmax.sum_MN[0],
            sums["jsd"][1] / (1 - self.beta) if jsd else zero_N,
            sums["skewed_kl"][1] / (1 - self.alpha) if skewed else zero_N,
        ]  # fmt: skip
        if cosine:
            product_N, student_N, teacher_N = sums["cosine"]
            scale_N = cosine * (student_N * teacher_N).rsqrt()
            columns += [scale_N * product_N / student_N, scale_N]
        else:
            columns += [zero_N, zero_N]
        t = objective.temperature  # T**2 of the loss, and 1 / T of the logits' derivative
        weights = [forward * t, reverse * t, jsd * t * (1 - self.beta), skewed * t * (1 - self.alpha),
                   mse * 2 / objective.shard.vocab_size, cosine]  # fmt: skip
        kernels.gradient(
            self.student_NV, self.teacher_NV, torch.stack(columns, dim=-1),
            self.labels_N - objective.shard.vocab_start, t, objective.ce_weight, self.logs, weights,
        )  # fmt: skip


def _write_plain_gradient(student_NV: Tensor, coefficient_NC: Tensor, labels_N: Tensor, objective: Objective) -> None:
    """Write ``factor_n softmax(z_n)_v - weight [v = label_n]`` over the logits; the factor is the last coefficient."""
    columns_N = labels_N - objective.shard.vocab_start
    kernels.gradient(student_NV, None, coefficient_NC, columns_N, 1.0, objective.ce_weight, NO_WEIGHTS[:4], NO_WEIGHTS)


def _everywhere(values_NV: Tensor, ids_NK: Tensor, shard: VocabShard) -> Tensor:
    """Return ``[N, K]`` in float32: entries of global ids, from whatever rank holds them; 0 where none does."""
    return all_reduce_sum(shard.at(values_NV, ids_NK).float(), shard.tp_group)


def _sums_without(logits_NV: Tensor, ids_NK: Tensor, z_NK: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's maximum, ``sum_v exp(z_v - max)`` and the part of it outside K; makes K's logits -inf.

    The rest is summed without the K entries: 1 minus their sum would cancel where the model is sure.
    """
    shard.add_at(logits_NV, ids_NK, torch.full_like(z_NK, -torch.inf))
    local_top_N, _, local_sum_N = kernels.statistics(logits_NV, None, 1.0, NO_WEIGHTS).unbind(dim=-1)
    top_N = all_reduce_max(torch.maximum(local_top_N, z_NK.amax(dim=-1)), shard.tp_group)
    sum_rest_N = all_reduce_sum(local_sum_N * (local_top_N - top_N).exp(), shard.tp_group)
    return top_N, sum_rest_N + (z_NK - top_N[:, None]).exp().sum(dim=-1), sum_rest_N


def _cross_entropy(labels_N: Tensor, shifted: Tensor, log_sum: Tensor, shard: VocabShard) -> Tensor:
    """Return the cross entropy from the label's logit minus the maximum; NaN where the label is no entry."""
    is_label_N = (labels_N >= 0) & (labels_N < shard.vocab_size)
    return torch.where(is_label_N, log_sum - shifted, torch.nan)
