"""linear_kd, linear_ce and linear_ce_sum against the definition, whatever the chunks and the ranks.

Shape suffixes: N tokens, V vocabulary, H student width, G teacher width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from compactlm_nemo.distill.linear_kd import linear_ce, linear_ce_sum, linear_kd
from compactlm_nemo.errors import ConfigError, DataError
from compactlm_nemo.parallel.collectives import all_reduce_max, all_reduce_sum, broadcast_object, gather_objects
from tests.ranks import run_ranks


class Case(NamedTuple):
    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_NG: Tensor
    teacher_VG: Tensor
    labels_N: Tensor
    mask_N: Tensor

    def leaves(self) -> Case:
        return self._replace(
            hidden_NH=self.hidden_NH.detach().clone().requires_grad_(),
            weight_VH=self.weight_VH.detach().clone().requires_grad_(),
        )


def make(tokens: int, vocab: int, rows: int, width: int = 31, teacher_width: int = 37, scale: float = 0.3) -> Case:
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


def naive_log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    log_z = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - log_z for x in row]


def naive_sums(case: Case, vocab: int, temperature: float) -> tuple[float, float, float]:
    """The three sums in Python floats."""
    rows = zip(
        (case.hidden_NH @ case.weight_VH[:vocab].T).tolist(),
        (case.teacher_NG @ case.teacher_VG[:vocab].T).tolist(),
        case.labels_N.tolist(),
        case.mask_N.tolist(),
        strict=True,
    )
    kd, ce, teacher_ce = [], [], []
    for student, teacher, label, mask in rows:
        if mask == 0:
            continue
        log_q = naive_log_softmax([x / temperature for x in student])
        log_p = naive_log_softmax([x / temperature for x in teacher])
        kl = math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        kd.append(mask * temperature**2 * kl)
        ce.append(-mask * naive_log_softmax(student)[label])
        teacher_ce.append(-mask * naive_log_softmax(teacher)[label])
    return math.fsum(kd), math.fsum(ce), math.fsum(teacher_ce)


def naive_grads(case: Case, vocab: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Autograd of the plain formula over the whole unpadded vocabulary."""
    leaf = case.leaves()
    p = torch.softmax(case.teacher_NG @ case.teacher_VG[:vocab].T / temperature, dim=-1)
    log_q = torch.log_softmax(leaf.hidden_NH @ leaf.weight_VH[:vocab].T / temperature, dim=-1)
    kl_N = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(dim=-1)
    (temperature**2 * kl_N * case.mask_N).sum().backward()
    return leaf.hidden_NH.grad, leaf.weight_VH.grad


def naive_ce_grads(case: Case, vocab: int) -> tuple[Tensor, Tensor]:
    """The same for the student's language-model loss."""
    leaf = case.leaves()
    logits_NV = leaf.hidden_NH @ leaf.weight_VH[:vocab].T
    per_token_N = torch.nn.functional.cross_entropy(logits_NV, leaf.labels_N, reduction="none", ignore_index=-100)
    (per_token_N * case.mask_N).sum().backward()
    return leaf.hidden_NH.grad, leaf.weight_VH.grad


SHAPES = [(3, 47, 47, 2), (47, 123, 128, 10), (31, 5, 64, 31)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("tokens", "vocab", "rows", "chunk"), SHAPES)
def test_values_and_gradients_are_the_definition(
    tokens: int, vocab: int, rows: int, chunk: int, temperature: float
) -> None:
    leaf = make(tokens, vocab, rows).leaves()
    got = linear_kd(*leaf, temperature=temperature, chunk_tokens=chunk, vocab_size=vocab)
    want = torch.tensor(naive_sums(leaf, vocab, temperature), dtype=torch.float64)
    assert_close(torch.stack(list(got)).detach(), want, rtol=1e-12, atol=1e-12)
    (3 * got.kd_sum).backward()
    grad_hidden, grad_weight = naive_grads(leaf, vocab, temperature)
    assert_close(leaf.hidden_NH.grad, 3 * grad_hidden, rtol=1e-10, atol=1e-12)
    assert_close(leaf.weight_VH.grad, 3 * grad_weight, rtol=1e-10, atol=1e-12)
    assert not leaf.weight_VH.grad[vocab:].any()
    assert not leaf.hidden_NH.grad[leaf.mask_N == 0].any()
    assert not got.ce_sum.requires_grad and not got.teacher_ce_sum.requires_grad


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradcheck(temperature: float) -> None:
    leaf = make(5, 9, 12, width=4, teacher_width=3, scale=1.0).leaves()
    fractional_N = torch.linspace(0, 1, 5, dtype=torch.float64)

    def loss(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        labels_N = leaf.labels_N.clamp(min=0)
        return linear_kd(
            hidden_NH, weight_VH, leaf.teacher_NG, leaf.teacher_VG, labels_N, fractional_N,
            temperature=temperature, chunk_tokens=2, vocab_size=9,
        ).kd_sum  # fmt: skip

    assert torch.autograd.gradcheck(loss, (leaf.hidden_NH, leaf.weight_VH))


@pytest.mark.parametrize(("tokens", "vocab", "rows", "chunk"), SHAPES)
def test_linear_ce_sum_is_cross_entropy_with_its_gradient(tokens: int, vocab: int, rows: int, chunk: int) -> None:
    case = make(tokens, vocab, rows)
    leaf = case._replace(mask_N=case.mask_N * torch.linspace(0.5, 1, tokens).double()).leaves()
    rest = (leaf.labels_N, leaf.mask_N)
    got = linear_ce_sum(leaf.hidden_NH, leaf.weight_VH, *rest, chunk_tokens=chunk, vocab_size=vocab)
    assert_close(got.item(), naive_sums(leaf, vocab, 1.0)[1], rtol=1e-12, atol=1e-12)
    (3 * got).backward()
    grad_hidden, grad_weight = naive_ce_grads(leaf, vocab)
    assert_close(leaf.hidden_NH.grad, 3 * grad_hidden, rtol=1e-10, atol=1e-12)
    assert_close(leaf.weight_VH.grad, 3 * grad_weight, rtol=1e-10, atol=1e-12)
    with torch.no_grad(), Recorder() as seen:
        linear_ce_sum(leaf.hidden_NH, leaf.weight_VH, *rest, chunk_tokens=chunk, vocab_size=vocab)
    assert seen.products == -(-tokens // chunk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand(dtype: torch.dtype) -> None:
    # The first hidden unit times +-1 is the logit itself, exact in every dtype.
    signs_V = torch.tensor([1.0, -1, 1, -1, -1, 1, 1], dtype=dtype)
    weight_VH = torch.stack([signs_V, torch.arange(7, dtype=dtype)], dim=1)
    hidden_NH = torch.tensor([[1e4, 1], [-1e4, 2], [1e4, 0]], dtype=dtype)
    teacher_NG = torch.tensor([[1e4, 2], [-1e4, 1], [-1e4, 0]], dtype=dtype)
    labels_N = torch.tensor([1, 4, 6])
    leaf = Case(hidden_NH, weight_VH, teacher_NG, weight_VH.clone(), labels_N, torch.ones(3, dtype=dtype)).leaves()
    got = linear_kd(*leaf, chunk_tokens=2, vocab_size=7)
    wide = Case(*[x if x is labels_N else x.detach().double() for x in leaf])
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    want = torch.tensor(naive_sums(wide, 7, 1.0), dtype=torch.float64)
    assert_close(torch.stack(list(got)).detach().double(), want, **tolerance)
    got.kd_sum.backward()
    grad_hidden, grad_weight = naive_grads(wide, 7, 1.0)
    assert_close(leaf.hidden_NH.grad.double(), grad_hidden, **tolerance)
    assert_close(leaf.weight_VH.grad.double(), grad_weight, rtol=1e-5, atol=1e-2)  # entries reach 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teacher_equal_to_student_gives_zero(dtype: torch.dtype, temperature: float) -> None:
    case = make(47, 123, 128)
    hidden_NH, weight_VH = case.hidden_NH.to(dtype), case.weight_VH.to(dtype)
    leaf = case._replace(hidden_NH=hidden_NH, weight_VH=weight_VH, teacher_NG=hidden_NH, teacher_VG=weight_VH).leaves()
    got = linear_kd(*leaf, temperature=temperature, chunk_tokens=10, vocab_size=123)
    got.kd_sum.backward()
    assert got.kd_sum.item() == 0
    assert got.ce_sum.item() == got.teacher_ce_sum.item() > 0
    assert not leaf.hidden_NH.grad.any() and not leaf.weight_VH.grad.any()


def test_chunk_size_changes_nothing() -> None:
    results = []
    for chunk in (1, 7, 47, 1000):
        leaf = make(47, 123, 128).leaves()
        got = linear_kd(*leaf, temperature=2.0, chunk_tokens=chunk, vocab_size=123)
        got.kd_sum.backward()
        results.append([*[x.detach() for x in got], leaf.hidden_NH.grad, leaf.weight_VH.grad])
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_bf16_weight_gradient_is_summed_in_float32() -> None:
    case = make(400, 23, 23)
    half = Case(*[x.bfloat16() if x.is_floating_point() else x for x in case])
    leaf = half.leaves()
    got = linear_kd(*leaf, chunk_tokens=1, vocab_size=23)
    got.kd_sum.backward()
    assert got.kd_sum.dtype == torch.float32
    assert leaf.weight_VH.grad.dtype == leaf.hidden_NH.grad.dtype == torch.bfloat16
    wide = Case(*[x.double() if x.is_floating_point() else x for x in half])
    assert_close(got.kd_sum.item(), naive_sums(wide, 23, 1.0)[0], rtol=5e-3, atol=0)
    for grad, want in zip((leaf.hidden_NH.grad, leaf.weight_VH.grad), naive_grads(wide, 23, 1.0), strict=True):
        # 400 additions in bf16 would lose about 3 %.
        assert (grad.double() - want).norm() < 0.01 * want.norm()


class Recorder(TorchDispatchMode):
    """Counts matrix products and keeps the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func is torch.ops.aten.mm.default
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(("hidden", "weight", "products"), [(0, 0, 2), (1, 0, 3), (0, 1, 3), (1, 1, 4)])
def test_only_wanted_gradients_are_computed(hidden: bool, weight: bool, products: int) -> None:
    case = make(300, 200, 200)
    case.hidden_NH.requires_grad_(bool(hidden))
    case.weight_VH.requires_grad_(bool(weight))
    with Recorder() as seen:
        linear_kd(*case, chunk_tokens=10, vocab_size=200)
    assert seen.products == 30 * products
    assert seen.largest <= max(300 * 37, 200 * 37)  # inputs; full logits would be 300 * 200
    with torch.no_grad(), Recorder() as seen:
        linear_kd(*case, chunk_tokens=10, vocab_size=200)
    assert seen.products == 30 * 2


def test_inputs_stay_as_they_are() -> None:
    case = make(47, 123, 128)
    before = [x.clone() for x in case]
    linear_kd(*case.leaves(), temperature=2.0, chunk_tokens=10, vocab_size=123).kd_sum.backward()
    linear_ce(case.hidden_NH, case.weight_VH, case.labels_N, case.mask_N, chunk_tokens=10, vocab_size=123)
    assert_close(list(case), before, rtol=0, atol=0)


def test_linear_ce_is_cross_entropy() -> None:
    case = make(47, 123, 128)
    case.weight_VH.requires_grad_()
    got = linear_ce(case.hidden_NH, case.weight_VH, case.labels_N, case.mask_N, chunk_tokens=10, vocab_size=123)
    rows = (case.hidden_NH @ case.weight_VH[:123].T).tolist()
    want = [
        -naive_log_softmax(row)[label] if mask else 0.0
        for row, label, mask in zip(rows, case.labels_N.tolist(), case.mask_N.tolist(), strict=True)
    ]
    assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert not got.requires_grad


def test_bad_input_is_named() -> None:
    case = make(5, 9, 12)
    with pytest.raises(ConfigError, match="distill.temperature=0"):
        linear_kd(*case, temperature=0.0, chunk_tokens=2, vocab_size=9)
    with pytest.raises(ConfigError, match="distill.chunk_tokens=0"):
        linear_kd(*case, chunk_tokens=0, vocab_size=9)
    with pytest.raises(ConfigError, match="teacher head rows=11"):
        linear_kd(*case._replace(teacher_VG=case.teacher_VG[:11]), chunk_tokens=2, vocab_size=9)
    with pytest.raises(DataError, match="teacher tokens=4"):
        linear_kd(*case._replace(teacher_NG=case.teacher_NG[:4]), chunk_tokens=2, vocab_size=9)
    with pytest.raises(DataError, match=r"must both be \[5\]"):
        linear_kd(*case._replace(mask_N=case.mask_N[:4]), chunk_tokens=2, vocab_size=9)
    for label in (9, -100):
        labels_N, mask_N = torch.full((5,), label), torch.ones(5)
        with pytest.raises(DataError, match=rf"label={label} must be in \[0, 9\)"):
            linear_ce(case.hidden_NH, case.weight_VH, labels_N, mask_N, chunk_tokens=2, vocab_size=9)


def _tp_matches(rank: int, world: int, vocab: int, temperature: float) -> None:
    case = make(47, vocab, 128)
    size = 128 // world
    shard = slice(rank * size, (rank + 1) * size)
    leaf = case._replace(weight_VH=case.weight_VH[shard], teacher_VG=case.teacher_VG[shard]).leaves()
    where = {"vocab_size": vocab, "vocab_start": rank * size, "tp_group": dist.group.WORLD}
    got = linear_kd(*leaf, temperature=temperature, chunk_tokens=10, **where)
    got.kd_sum.backward()
    want = torch.tensor(naive_sums(case, vocab, temperature), dtype=torch.float64)
    assert_close(torch.stack(list(got)).detach(), want, rtol=1e-12, atol=1e-12)
    grad_hidden, grad_weight = naive_grads(case, vocab, temperature)
    assert_close(leaf.hidden_NH.grad, grad_hidden, rtol=1e-10, atol=1e-12)
    assert_close(leaf.weight_VH.grad, grad_weight[shard], rtol=1e-10, atol=1e-12)
    ce_N = linear_ce(case.hidden_NH, leaf.weight_VH, case.labels_N, case.mask_N, chunk_tokens=10, **where)
    assert_close(ce_N.sum(), want[1], rtol=1e-12, atol=1e-12)
    alone = case._replace(weight_VH=case.weight_VH[shard]).leaves()
    got = linear_ce_sum(alone.hidden_NH, alone.weight_VH, alone.labels_N, alone.mask_N, chunk_tokens=10, **where)
    got.backward()
    assert_close(got.detach(), want[1], rtol=1e-12, atol=1e-12)
    grad_hidden, grad_weight = naive_ce_grads(case, vocab)
    assert_close(alone.hidden_NH.grad, grad_hidden, rtol=1e-10, atol=1e-12)
    assert_close(alone.weight_VH.grad, grad_weight[shard], rtol=1e-10, atol=1e-12)
    # The same collectives with logits far apart between the ranks: a local maximum would overflow or vanish.
    far = case._replace(hidden_NH=case.hidden_NH * 3e3)
    ce_N = linear_ce(far.hidden_NH, leaf.weight_VH, far.labels_N, far.mask_N, chunk_tokens=10, **where)
    assert_close(ce_N.sum().item(), naive_sums(far, vocab, 1.0)[1], rtol=1e-10, atol=0)


# 60 of 128 rows: with four ranks two of them hold padding only.
@pytest.mark.parametrize(("world", "vocab", "temperature"), [(2, 123, 2.0), (4, 123, 1.0), (4, 60, 0.5)])
def test_tensor_parallel_matches_one_rank(tmp_path: Path, world: int, vocab: int, temperature: float) -> None:
    run_ranks(_tp_matches, world, tmp_path, vocab, temperature)


def _collectives(rank: int, world: int) -> None:
    mine = torch.arange(6.0).view(2, 3).T * (rank + 1)  # not contiguous
    before = mine.clone()
    base = torch.arange(6.0).view(2, 3).T
    assert_close(all_reduce_sum(mine, dist.group.WORLD), base * 3, rtol=0, atol=0)
    assert_close(all_reduce_max(mine, dist.group.WORLD), base * 2, rtol=0, atol=0)
    assert_close(mine, before, rtol=0, atol=0)
    assert broadcast_object({"rank": rank}, src=1) == {"rank": 1}
    assert gather_objects(rank) == ([0, 1] if rank == 0 else [])


def test_collectives(tmp_path: Path) -> None:
    run_ranks(_collectives, 2, tmp_path)
    one = torch.ones(2)
    assert all_reduce_sum(one, None) is not one and all_reduce_sum(one, None).equal(one)
    assert broadcast_object("a") == "a" and gather_objects("a") == ["a"]


def _one_rank_fails(rank: int, world: int) -> None:
    assert rank == 0, "rank one says no"


def test_a_failing_rank_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rank one says no"):
        run_ranks(_one_rank_fails, 2, tmp_path)
