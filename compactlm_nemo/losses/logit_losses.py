"""The logit losses of distillation, by name: values and gradients on a chunk of tokens, with the vocabulary sharded.

To add a loss: a class with the three methods of `LogitLoss`, its entry in `weighted_losses`, and its weight, under that
entry's name, in `LossConfig` of config/loss.py (also in `names` there); for a GPU its sums and gradient in kernels.py,
which fused.py starts; tests/losses/reference.py takes its definition.

Every loss compares the student's distribution ``q = softmax(x)`` with the teacher's ``p = softmax(y)``, where ``x`` and
``y`` are logits divided by the temperature T, and is multiplied by ``T**2``, so that the gradient keeps its size when
T grows. A loss is computed in three steps, because the vocabulary may lie on several ranks: sums over this rank's
entries; the value from the sums over all ranks; the gradient to this rank's ``x`` from both.

Shape suffixes: N tokens, V vocabulary entries of this rank, K sums of a loss, L losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.losses.vocabulary import LogProbs, VocabShard


@dataclass(frozen=True)
class Comparison:
    """A comparison holds both models' log-probabilities of the same tokens, over this rank's entries."""

    student: LogProbs
    """q of the formulas below."""
    teacher: LogProbs
    """p of the formulas below."""
    vocab_size: int
    """Entries over all ranks."""
    log_mixtures: dict[float, Tensor] = field(default_factory=dict)
    """Results of `log_mixture_NV` by the teacher's share: losses of one share, and their gradients, need them again."""

    def log_mixture_NV(self, teacher_share: float) -> Tensor:
        """Return ``log(share p + (1 - share) q)`` for a share in [0, 1), made once; not to be overwritten."""
        if not teacher_share:
            return self.student.log_prob_NV
        if teacher_share not in self.log_mixtures:
            student_NV = self.student.log_prob_NV + math.log1p(-teacher_share)
            teacher_NV = self.teacher.log_prob_NV + math.log(teacher_share)
            self.log_mixtures[teacher_share] = torch.logaddexp(teacher_NV, student_NV)
        return self.log_mixtures[teacher_share]


class LogitLoss(Protocol):
    """A loss has three steps; ``sums_KN`` below are those of `sums`, added over the ranks that share the vocabulary."""

    def sums(self, both: Comparison) -> Tensor:
        """Return ``[K, N]``: sums over this rank's entries."""

    def value(self, sums_KN: Tensor) -> Tensor:
        """Return ``[N]``: the loss of each token, without the factor ``T**2``."""

    def gradient(self, both: Comparison, sums_KN: Tensor) -> Tensor:
        """Return ``[N, V]``: the derivative of the value with respect to ``x_NV``, in memory of its own."""


class ForwardKL:
    """``sum_v p_v (log p_v - log q_v)``; gradient ``q - p``. Source: Hinton et al. 2015, arXiv:1503.02531."""

    def sums(self, both: Comparison) -> Tensor:
        student, teacher = both.student, both.teacher
        return torch.linalg.vecdot(teacher.prob_NV, teacher.log_prob_NV - student.log_prob_NV)[None]

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN[0]

    def gradient(self, both: Comparison, sums_KN: Tensor) -> Tensor:
        return both.student.prob_NV - both.teacher.prob_NV


class ReverseKL:
    """``R = sum_v q_v (log q_v - log p_v)``; gradient ``q_v (log q_v - log p_v - R)``. Source: arXiv:2306.08543."""

    def sums(self, both: Comparison) -> Tensor:
        return self._terms(both).sum(dim=-1)[None]

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN[0]

    def gradient(self, both: Comparison, sums_KN: Tensor) -> Tensor:
        return self._terms(both).sub_(both.student.prob_NV * sums_KN[0, :, None])

    @staticmethod
    def _terms(both: Comparison) -> Tensor:
        return (both.student.log_prob_NV - both.teacher.log_prob_NV).mul_(both.student.prob_NV)


class JensenShannon:
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``.

    With ``g_v = (1 - beta) q_v (log q_v - log m_v)`` the gradient is ``g_v - q_v sum_u g_u``: what ``m`` contributes
    cancels. Source: generalised JSD of Agarwal et al. 2023, arXiv:2306.13649.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def sums(self, both: Comparison) -> Tensor:
        log_m_NV = both.log_mixture_NV(self.beta)
        teacher_N = (both.teacher.log_prob_NV - log_m_NV).mul_(both.teacher.prob_NV).sum(dim=-1)
        student_N = (both.student.log_prob_NV - log_m_NV).mul_(both.student.prob_NV).sum(dim=-1)
        return torch.stack([self.beta * teacher_N, (1 - self.beta) * student_N])

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN.sum(dim=0)

    def gradient(self, both: Comparison, sums_KN: Tensor) -> Tensor:
        gap_NV = both.student.log_prob_NV - both.log_mixture_NV(self.beta)
        return gap_NV.mul_(1 - self.beta).sub_(sums_KN[1, :, None]).mul_(both.student.prob_NV)


class SkewedKL:
    """``KL(p || m)`` with ``m = alpha p + (1 - alpha) q``; alpha = 0 is the forward KL.

    With ``r_v = (1 - alpha) p_v q_v / m_v`` the gradient is ``q_v sum_u r_u - r_v``.
    Source: DistiLLM, Ko et al. 2024, arXiv:2402.03898.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def sums(self, both: Comparison) -> Tensor:
        log_m_NV = both.log_mixture_NV(self.alpha)
        value_N = (both.teacher.log_prob_NV - log_m_NV).mul_(both.teacher.prob_NV).sum(dim=-1)
        return torch.stack([value_N, self._pull(both).sum(dim=-1)])

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN[0]

    def gradient(self, both: Comparison, sums_KN: Tensor) -> Tensor:
        return both.student.prob_NV * sums_KN[1, :, None] - self._pull(both)

    def _pull(self, both: Comparison) -> Tensor:
        """Return ``r_v``."""
        # In logarithms, because two probabilities that both underflow still have a quotient.
        log_product_NV = both.teacher.log_prob_NV + both.student.log_prob_NV
        return log_product_NV.sub_(both.log_mixture_NV(self.alpha)).exp_().mul_(1 - self.alpha)


class LogitMSE:
    """``mean_v (x_v - y_v)**2``; gradient ``2 (x_v - y_v) / V``. With the factor T**2 it is the same at every T."""

    def sums(self, both: Comparison) -> Tensor:
        return self._gap(both).square_().sum(dim=-1)[None] / both.vocab_size

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN[0]

    def gradient(self, both: Comparison, sums_KN: Tensor) -> Tensor:
        return self._gap(both).mul_(2 / both.vocab_size)

    @staticmethod
    def _gap(both: Comparison) -> Tensor:
        student, teacher = both.student, both.teacher
        return (student.log_prob_NV - teacher.log_prob_NV).add_(student.shift_N1 - teacher.shift_N1)


class LogitCosine:
    """``1 - x.y / (|x| |y|)``; gradient ``(x_v x.y / |x|**2 - y_v) / (|x| |y|)``. Not defined for a zero vector."""

    def sums(self, both: Comparison) -> Tensor:
        x_NV, y_NV = both.student.scaled_logits_NV, both.teacher.scaled_logits_NV
        return torch.stack([(x_NV * y_NV).sum(dim=-1), x_NV.square().sum(dim=-1), y_NV.square().sum(dim=-1)])

    def value(self, sums_KN: Tensor) -> Tensor:
        product_N, student_N, teacher_N = sums_KN
        return 1 - product_N * (student_N * teacher_N).rsqrt()

    def gradient(self, both: Comparison, sums_KN: Tensor) -> Tensor:
        product_N, student_N, teacher_N = sums_KN
        share_N1, scale_N1 = (product_N / student_N)[:, None], (student_N * teacher_N).rsqrt()[:, None]
        return both.student.scaled_logits_NV.mul_(share_N1).sub_(both.teacher.scaled_logits_NV).mul_(scale_N1)


def weighted_losses(cfg: LossConfig) -> dict[str, tuple[float, LogitLoss]]:
    """Return the weight and the loss of every setting that compares with the teacher and is not 0, by its name."""
    losses: dict[str, LogitLoss] = {
        "forward_kl": ForwardKL(),
        "reverse_kl": ReverseKL(),
        "jsd": JensenShannon(cfg.jsd_beta),
        "skewed_kl": SkewedKL(cfg.skew),
        "mse": LogitMSE(),
        "cosine": LogitCosine(),
    }
    return {name: (getattr(cfg, name), loss) for name, loss in losses.items() if getattr(cfg, name)}


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
    fused: bool
    """Whether kernels compare the logits; `Head.is_fused`."""


class BlockLosses(NamedTuple):
    """`BlockLosses` are the losses of some tokens of a chunk."""

    block: slice
    """Which tokens of the chunk these are."""
    values_LN: Tensor
    """``[L + 2, N]``: each loss with the factor T**2, then both models' language-model losses at T = 1."""
