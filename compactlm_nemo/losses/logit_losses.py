"""The logit losses of distillation, by name: values and gradients on a chunk of tokens, with the vocabulary sharded.

Every loss compares the student's distribution ``q = softmax(x)`` with the teacher's ``p = softmax(y)``, where ``x`` and
``y`` are logits divided by the temperature T, and is multiplied by ``T**2``, so that the gradient keeps its size when
T grows. A loss is computed in three steps, because the vocabulary may lie on several ranks: sums over this rank's
entries; the value from the sums over all ranks; the gradient to this rank's ``x`` from both.

Shape suffixes: N tokens, V vocabulary entries of this rank, K sums of a loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from compactlm_nemo.config.loss import LossConfig


@dataclass(frozen=True)
class Pair:
    """Student and teacher on a chunk of tokens, both over this rank's entries of the vocabulary."""

    log_q_NV: Tensor
    """Student's log-probabilities at T."""
    log_p_NV: Tensor
    """Teacher's."""
    q_NV: Tensor
    """Student's probabilities at T."""
    p_NV: Tensor
    """Teacher's."""
    student_shift_N1: Tensor
    """What the student's logits, divided by T, are above `log_q_NV`."""
    teacher_shift_N1: Tensor
    """The same of the teacher's."""
    vocab_size: int
    """Entries over all ranks."""
    mixtures: dict[float, Tensor] = field(default_factory=dict)
    """What `log_mixture_NV` has made."""

    def log_mixture_NV(self, teacher_share: float) -> Tensor:
        """``log(share p + (1 - share) q)`` for a share in [0, 1), made once; not to be overwritten."""
        if not teacher_share:
            return self.log_q_NV
        if teacher_share not in self.mixtures:
            student_NV = self.log_q_NV + math.log1p(-teacher_share)
            self.mixtures[teacher_share] = torch.logaddexp(self.log_p_NV + math.log(teacher_share), student_NV)
        return self.mixtures[teacher_share]

    @property
    def x_NV(self) -> Tensor:
        """Student's logits divided by T."""
        return self.log_q_NV + self.student_shift_N1

    @property
    def y_NV(self) -> Tensor:
        """Teacher's logits divided by T."""
        return self.log_p_NV + self.teacher_shift_N1


class LogitLoss(Protocol):
    """One loss; ``sums_KN`` below are those of `sums`, added over the ranks that share the vocabulary."""

    def sums(self, pair: Pair) -> Tensor:
        """``[K, N]``: sums over this rank's entries."""

    def value(self, sums_KN: Tensor) -> Tensor:
        """``[N]``: the loss of each token, without the factor ``T**2``."""

    def gradient(self, pair: Pair, sums_KN: Tensor) -> Tensor:
        """``[N, V]``: derivative of the value with respect to ``x_NV``, in memory of its own."""


class ForwardKL:
    """``sum_v p_v (log p_v - log q_v)``; gradient ``q - p``. Source: Hinton et al. 2015, arXiv:1503.02531."""

    def sums(self, pair: Pair) -> Tensor:
        return torch.linalg.vecdot(pair.p_NV, pair.log_p_NV - pair.log_q_NV)[None]

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN[0]

    def gradient(self, pair: Pair, sums_KN: Tensor) -> Tensor:
        return pair.q_NV - pair.p_NV


class ReverseKL:
    """``R = sum_v q_v (log q_v - log p_v)``; gradient ``q_v (log q_v - log p_v - R)``. Source: arXiv:2306.08543."""

    def sums(self, pair: Pair) -> Tensor:
        return self._terms(pair).sum(dim=-1)[None]

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN[0]

    def gradient(self, pair: Pair, sums_KN: Tensor) -> Tensor:
        return self._terms(pair).sub_(pair.q_NV * sums_KN[0, :, None])

    @staticmethod
    def _terms(pair: Pair) -> Tensor:
        return (pair.log_q_NV - pair.log_p_NV).mul_(pair.q_NV)


class JensenShannon:
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``.

    With ``g_v = (1 - beta) q_v (log q_v - log m_v)`` the gradient is ``g_v - q_v sum_u g_u``: what ``m`` contributes
    cancels. Source: generalised JSD of Agarwal et al. 2023, arXiv:2306.13649.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def sums(self, pair: Pair) -> Tensor:
        log_m_NV = pair.log_mixture_NV(self.beta)
        teacher_N = (pair.log_p_NV - log_m_NV).mul_(pair.p_NV).sum(dim=-1)
        student_N = (pair.log_q_NV - log_m_NV).mul_(pair.q_NV).sum(dim=-1)
        return torch.stack([self.beta * teacher_N, (1 - self.beta) * student_N])

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN.sum(dim=0)

    def gradient(self, pair: Pair, sums_KN: Tensor) -> Tensor:
        gap_NV = pair.log_q_NV - pair.log_mixture_NV(self.beta)
        return gap_NV.mul_(1 - self.beta).sub_(sums_KN[1, :, None]).mul_(pair.q_NV)


class SkewedKL:
    """``KL(p || m)`` with ``m = alpha p + (1 - alpha) q``; alpha = 0 is the forward KL.

    With ``r_v = (1 - alpha) p_v q_v / m_v`` the gradient is ``q_v sum_u r_u - r_v``.
    Source: DistiLLM, Ko et al. 2024, arXiv:2402.03898.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def sums(self, pair: Pair) -> Tensor:
        log_m_NV = pair.log_mixture_NV(self.alpha)
        value_N = (pair.log_p_NV - log_m_NV).mul_(pair.p_NV).sum(dim=-1)
        return torch.stack([value_N, self._pull(pair, log_m_NV).sum(dim=-1)])

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN[0]

    def gradient(self, pair: Pair, sums_KN: Tensor) -> Tensor:
        return pair.q_NV * sums_KN[1, :, None] - self._pull(pair, pair.log_mixture_NV(self.alpha))

    def _pull(self, pair: Pair, log_m_NV: Tensor) -> Tensor:
        # In logarithms: the quotient of two probabilities that both underflow is still right.
        return (pair.log_p_NV + pair.log_q_NV).sub_(log_m_NV).exp_().mul_(1 - self.alpha)


class LogitMSE:
    """``mean_v (x_v - y_v)**2``; gradient ``2 (x_v - y_v) / V``. With the factor T**2 it is the same at every T."""

    def sums(self, pair: Pair) -> Tensor:
        return self._gap(pair).square_().sum(dim=-1)[None] / pair.vocab_size

    def value(self, sums_KN: Tensor) -> Tensor:
        return sums_KN[0]

    def gradient(self, pair: Pair, sums_KN: Tensor) -> Tensor:
        return self._gap(pair).mul_(2 / pair.vocab_size)

    @staticmethod
    def _gap(pair: Pair) -> Tensor:
        return (pair.log_q_NV - pair.log_p_NV).add_(pair.student_shift_N1 - pair.teacher_shift_N1)


class LogitCosine:
    """``1 - x.y / (|x| |y|)``; gradient ``(x_v x.y / |x|**2 - y_v) / (|x| |y|)``. Not defined for a zero vector."""

    def sums(self, pair: Pair) -> Tensor:
        x_NV, y_NV = pair.x_NV, pair.y_NV
        return torch.stack([(x_NV * y_NV).sum(dim=-1), x_NV.square().sum(dim=-1), y_NV.square().sum(dim=-1)])

    def value(self, sums_KN: Tensor) -> Tensor:
        product_N, student_N, teacher_N = sums_KN
        return 1 - product_N * (student_N * teacher_N).rsqrt()

    def gradient(self, pair: Pair, sums_KN: Tensor) -> Tensor:
        product_N, student_N, teacher_N = sums_KN
        share_N1 = (product_N / student_N)[:, None]
        return (pair.x_NV * share_N1).sub_(pair.y_NV).mul_((student_N * teacher_N).rsqrt()[:, None])


def weighted_losses(cfg: LossConfig) -> dict[str, tuple[float, LogitLoss]]:
    """The losses that compare with the teacher and count, by the name of their setting."""
    every: dict[str, LogitLoss] = {
        "forward_kl": ForwardKL(),
        "reverse_kl": ReverseKL(),
        "jsd": JensenShannon(cfg.jsd_beta),
        "skewed_kl": SkewedKL(cfg.skew),
        "mse": LogitMSE(),
        "cosine": LogitCosine(),
    }
    return {name: (getattr(cfg, name), loss) for name, loss in every.items() if getattr(cfg, name)}
