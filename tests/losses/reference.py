"""The logit losses by their definitions, in Python floats and in float64 autograd; shares no call with the package.

Shape suffixes: N tokens, V vocabulary, H student width, G teacher width, K stored entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOSSES = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "mse", "cosine")


BETA, SKEW = 0.3, 0.2


class Case(NamedTuple):
    """A case holds student and teacher, each hidden states and a head, and tokens; some rows may be padding."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_NG: Tensor
    teacher_VG: Tensor
    labels_N: Tensor
    mask_N: Tensor

    def leaves(self) -> Case:
        """Returns a copy whose hidden states and head want gradients."""
        return self._replace(
            hidden_NH=self.hidden_NH.detach().clone().requires_grad_(),
            weight_VH=self.weight_VH.detach().clone().requires_grad_(),
        )


def make(tokens: int, vocab: int, rows: int, width: int = 31, teacher_width: int = 37, scale: float = 0.3) -> Case:
    """Makes a random case; three tenths of the tokens are masked and labelled -100."""
    rng = torch.Generator().manual_seed(tokens * 1000 + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    mask_N = (torch.rand(tokens, generator=rng) > 0.3).double()
    labels_N = torch.randint(vocab, (tokens,), generator=rng)
    return Case(
        normal(tokens, width) * scale,
        normal(rows, width),
        normal(tokens, teacher_width) * scale,
        normal(rows, teacher_width),
        torch.where(mask_N > 0, labels_N, -100),
        mask_N,
    )


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    log_z = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - log_z for x in row]


def kl(log_p: list[float], log_q: list[float]) -> float:
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


def mixture(log_p: list[float], log_q: list[float], share: float) -> list[float]:
    """Returns log(share p + (1 - share) q), with the larger factored out."""
    tops = [max(p, q) for p, q in zip(log_p, log_q, strict=True)]
    return [
        top + math.log(share * math.exp(p - top) + (1 - share) * math.exp(q - top))
        for p, q, top in zip(log_p, log_q, tops, strict=True)
    ]


def loss_of(name: str, student: list[float], teacher: list[float]) -> float:
    """Returns a loss of one token's logits, already divided by the temperature."""
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "jsd":
        m = mixture(log_p, log_q, BETA)
        return BETA * kl(log_p, m) + (1 - BETA) * kl(log_q, m)
    if name == "skewed_kl":
        return kl(log_p, mixture(log_p, log_q, SKEW))
    if name == "mse":
        return math.fsum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)
    assert name == "cosine"
    product = math.fsum(s * t for s, t in zip(student, teacher, strict=True))
    return 1 - product / math.hypot(*student) / math.hypot(*teacher)


def rows(case: Case, vocab: int) -> list[tuple[list[float], list[float], int, float]]:
    """Returns (student logits, teacher logits, label, mask) of the tokens that count."""
    every = zip(
        (case.hidden_NH @ case.weight_VH[:vocab].T).tolist(),
        (case.teacher_NG @ case.teacher_VG[:vocab].T).tolist(),
        case.labels_N.tolist(),
        case.mask_N.tolist(),
        strict=True,
    )
    return [row for row in every if row[3]]


def loss_sum(name: str, case: Case, vocab: int, temperature: float) -> float:
    """Returns the masked sum of a loss, with the factor T**2."""
    return math.fsum(
        mask * temperature**2 * loss_of(name, [x / temperature for x in student], [x / temperature for x in teacher])
        for student, teacher, _, mask in rows(case, vocab)
    )


def ce_sums(case: Case, vocab: int) -> tuple[float, float]:
    """Returns the masked sums of both models' language-model losses."""
    student = math.fsum(-mask * log_softmax(s)[label] for s, _, label, mask in rows(case, vocab))
    teacher = math.fsum(-mask * log_softmax(t)[label] for _, t, label, mask in rows(case, vocab))
    return student, teacher


def _autograd_loss(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Returns `[N]`: `loss_of` as autograd can differentiate it, of logits divided by the temperature."""
    log_q, log_p = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    q, p = log_q.exp(), log_p.exp()
    if name == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if name == "jsd":
        log_m = (BETA * p + (1 - BETA) * q).log()
        return (BETA * p * (log_p - log_m) + (1 - BETA) * q * (log_q - log_m)).sum(-1)
    if name == "skewed_kl":
        return (p * (log_p - (SKEW * p + (1 - SKEW) * q).log())).sum(-1)
    if name == "mse":
        return (x - y).square().mean(-1)
    return 1 - torch.cosine_similarity(x, y, dim=-1)


def gradients(weights: dict[str, float], ce_weight: float, case: Case, vocab: int, temperature: float) -> list[Tensor]:
    """Returns autograd's gradients of the plain formula over the unpadded vocabulary, to hidden states and head."""
    leaf = case.leaves()
    z = leaf.hidden_NH @ leaf.weight_VH[:vocab].T
    y = case.teacher_NG @ case.teacher_VG[:vocab].T / temperature
    total = z.new_zeros(())
    for name, weight in weights.items():
        total = total + weight * (temperature**2 * _autograd_loss(name, z / temperature, y) * case.mask_N).sum()
    if ce_weight:
        ce_N = torch.nn.functional.cross_entropy(z, case.labels_N, reduction="none", ignore_index=-100)
        total = total + ce_weight * (ce_N * case.mask_N).sum()
    total.backward()
    return [leaf.hidden_NH.grad, leaf.weight_VH.grad]
