"""The distillation head on a GPU is the definition: every loss, values and gradients, in float32 and bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.losses.linear_kd import LinearKD, linear_kd
from compactlm_nemo.losses.targets import TeacherHead
from compactlm_nemo.losses.vocabulary import Head, VocabShard
from tests.losses.reference import BETA, LOSSES, SKEW, Case, ce_sums, gradients, loss_sum, make

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

ROUNDING = 2e-5
"""Of float32: 2^-24 in each of the 31 products and the sums of a logit of size 5. TF32, 2^-11, is 10 times over it."""


def _on_device(case: Case, dtype: torch.dtype) -> Case:
    """The case with its numbers rounded to a dtype, on the device under test."""
    tensors = {name: x.to(DEVICE, dtype) for name, x in case._asdict().items() if x.dtype.is_floating_point}
    return case._replace(**tensors, labels_N=case.labels_N.to(DEVICE)).leaves()


def _kd(case: Case, loss: LossConfig, temperature: float, *, vocab: int, chunk_tokens: int) -> LinearKD:
    head = Head(case.weight_VH, VocabShard(vocab_size=vocab), chunk_tokens)
    targets = TeacherHead(case.teacher_NG, case.teacher_VG)
    return linear_kd(
        case.hidden_NH, head, targets, case.labels_N, case.mask_N.float(), loss=loss, temperature=temperature
    )


def _gap(got: Tensor | None, want: Tensor) -> float:
    assert got is not None and bool(got.isfinite().all())
    return float((got.double().cpu() - want).norm() / want.norm())


def _gaps(
    case: Case, name: str, temperature: float, *, vocab: int, chunk_tokens: int, dtype: torch.dtype
) -> list[float]:
    """Relative differences from the float64 definition at the rounded numbers: loss, both LM losses, both gradients."""
    leaf = _on_device(case, dtype)
    rounded = Case(*(x.double().cpu() if x.dtype.is_floating_point else x.cpu() for x in leaf)).leaves()
    loss = LossConfig(**{"forward_kl": 0.0, name: 1.0}, jsd_beta=BETA, skew=SKEW)
    got = _kd(leaf, loss, temperature, vocab=vocab, chunk_tokens=chunk_tokens)
    got.loss_sum.backward()
    student_ce, teacher_ce = ce_sums(rounded, vocab)
    wanted = [loss_sum(name, rounded, vocab, temperature), student_ce, teacher_ce]
    values = [got.loss_sum.detach(), got.ce_sum, got.teacher_ce_sum]
    grad_hidden, grad_weight = gradients({name: 1.0}, 0.0, rounded, vocab, temperature)
    pairs = [(value, torch.tensor(want, dtype=torch.float64)) for value, want in zip(values, wanted, strict=True)]
    pairs += [(leaf.hidden_NH.grad, grad_hidden), (leaf.weight_VH.grad, grad_weight)]
    return [_gap(value, want) for value, want in pairs]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("tokens", "vocab", "rows", "chunk"), [(3, 47, 47, 2), (47, 123, 128, 10), (17, 2049, 2176, 16)]
)
def test_every_loss_is_the_definition_to_float32_rounding(
    tokens: int, vocab: int, rows: int, chunk: int, temperature: float, name: str
) -> None:
    gaps = _gaps(make(tokens, vocab, rows), name, temperature, vocab=vocab, chunk_tokens=chunk, dtype=torch.float32)
    assert max(gaps) < ROUNDING, gaps


def test_a_vocabulary_as_large_as_a_models_is_the_definition() -> None:
    gaps = _gaps(make(8, 128256, 128256), "forward_kl", 1.0, vocab=128256, chunk_tokens=3, dtype=torch.float32)
    assert max(gaps) < ROUNDING, gaps


def test_bf16_is_the_definition_to_bf16_rounding() -> None:
    # A logit of size up to 8 is rounded by 2^-9 of itself, so that log-probabilities are off by 1 / 64 at most, and a
    # gradient by as large a share of itself, and once more by its own rounding.
    gaps = _gaps(make(65, 2049, 2176), "forward_kl", 1.0, vocab=2049, chunk_tokens=64, dtype=torch.bfloat16)
    assert max(gaps) < 1 / 64 + 2**-8, gaps


def test_huge_logits_give_finite_losses_and_gradients() -> None:
    case = _on_device(make(9, 47, 47, scale=1e4), torch.float32)
    got = _kd(case, LossConfig(), 1.0, vocab=47, chunk_tokens=4)
    got.loss_sum.backward()
    assert case.hidden_NH.grad is not None
    assert bool(got.loss_sum.isfinite()) and bool(case.hidden_NH.grad.isfinite().all())
