"""linear_kd, linear_ce and linear_ce_sum against the definition, whatever the chunks and the ranks.

Shape suffixes: N tokens, V vocabulary, H student width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.errors import ConfigError, DataError
from compactlm_nemo.losses.linear_ce import linear_ce, linear_ce_sum
from compactlm_nemo.losses.linear_kd import LinearKD, linear_kd
from compactlm_nemo.losses.targets import TeacherHead
from compactlm_nemo.losses.vocabulary import Head, VocabShard, cache_blocks
from compactlm_nemo.parallel.collectives import all_reduce_max, all_reduce_sum, broadcast_object, gather_objects
from tests.losses.reference import BETA, LOSSES, SKEW, Case, ce_sums, gradients, log_softmax, loss_sum, make, rows
from tests.support.ranks import run_ranks


def head_of(case: Case, *, chunk_tokens: int, **shard: Any) -> Head:
    """Returns the student's head of a case; `shard` are the fields of `VocabShard`."""
    return Head(case.weight_VH, VocabShard(**shard), chunk_tokens)


def kd(
    case: Case, temperature: float = 1.0, loss: LossConfig | None = None, *, backward_once: bool = False, **head: Any
) -> LinearKD:
    """Calls `linear_kd` on a case, with the forward KL where no `loss` is given."""
    targets = TeacherHead(case.teacher_NG, case.teacher_VG)
    return linear_kd(
        case.hidden_NH, head_of(case, **head), targets, case.labels_N, case.mask_N,
        loss=loss or LossConfig(), temperature=temperature, backward_once=backward_once,
    )  # fmt: skip


def only(name: str, weight: float = 1.0) -> LossConfig:
    """Returns the settings of one loss alone."""
    return LossConfig(**{"forward_kl": 0.0, name: weight}, jsd_beta=BETA, skew=SKEW)


def sums(got: LinearKD) -> Tensor:
    return torch.stack([*got.terms.values(), got.ce_sum, got.teacher_ce_sum]).detach()


def wanted(name: str, case: Case, vocab: int, temperature: float) -> Tensor:
    return torch.tensor([loss_sum(name, case, vocab, temperature), *ce_sums(case, vocab)], dtype=torch.float64)


SHAPES = [(3, 47, 47, 2), (47, 123, 128, 10), (31, 5, 64, 31)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("tokens", "vocab", "rows", "chunk"), SHAPES)
def test_values_and_gradients_are_the_definition(
    tokens: int, vocab: int, rows: int, chunk: int, temperature: float, name: str
) -> None:
    leaf = make(tokens, vocab, rows).leaves()
    got = kd(leaf, temperature, only(name, 0.7), chunk_tokens=chunk, vocab_size=vocab)
    want = wanted(name, leaf, vocab, temperature)
    assert_close(sums(got), want, rtol=1e-11, atol=1e-12)
    assert_close(got.loss_sum.detach(), 0.7 * want[0], rtol=1e-11, atol=1e-12)
    (3 * got.loss_sum).backward()
    grad_hidden, grad_weight = gradients({name: 2.1}, 0.0, leaf, vocab, temperature)
    assert_close(leaf.hidden_NH.grad, grad_hidden, rtol=1e-9, atol=1e-11)
    assert_close(leaf.weight_VH.grad, grad_weight, rtol=1e-9, atol=1e-11)
    assert not leaf.weight_VH.grad[vocab:].any()
    assert not leaf.hidden_NH.grad[leaf.mask_N == 0].any()
    assert not got.ce_sum.requires_grad and not got.teacher_ce_sum.requires_grad
    assert not got.terms[name].requires_grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_weighted_sum_of_losses(temperature: float) -> None:
    weights = dict(zip(LOSSES, (0.5, 0.0, 1.5, 0.3, 0.2, 2.0), strict=True))
    leaf = make(47, 123, 128).leaves()
    cfg = LossConfig(**weights, cross_entropy=0.4, jsd_beta=BETA, skew=SKEW)
    got = kd(leaf, temperature, cfg, chunk_tokens=10, vocab_size=123)
    each = {name: loss_sum(name, leaf, 123, temperature) for name, weight in weights.items() if weight}
    assert {name: term.item() for name, term in got.terms.items()} == pytest.approx(each, rel=1e-11)
    total = sum(weights[name] * value for name, value in each.items()) + 0.4 * ce_sums(leaf, 123)[0]
    assert got.loss_sum.item() == pytest.approx(total, rel=1e-11)
    got.loss_sum.backward()
    grad_hidden, grad_weight = gradients(weights, 0.4, leaf, 123, temperature)
    assert_close(leaf.hidden_NH.grad, grad_hidden, rtol=1e-9, atol=1e-11)
    assert_close(leaf.weight_VH.grad, grad_weight, rtol=1e-9, atol=1e-11)


def test_a_backward_that_runs_once_copies_nothing() -> None:
    often, once = (make(47, 123, 128).leaves() for _ in range(2))
    (3 * kd(often, chunk_tokens=10, vocab_size=123).loss_sum).backward()
    got = 3 * kd(once, chunk_tokens=10, vocab_size=123, backward_once=True).loss_sum
    made = [each.data_ptr() for each in got.grad_fn.next_functions[0][0].input_gradients]
    got.backward(retain_graph=True)
    assert [once.hidden_NH.grad.data_ptr(), once.weight_VH.grad.data_ptr()] == made
    assert once.hidden_NH.grad.equal(often.hidden_NH.grad) and once.weight_VH.grad.equal(often.weight_VH.grad)
    with pytest.raises(RuntimeError, match=r"this backward has run; .* with backward_once=False"):
        got.backward()


def test_cross_entropy_alone_needs_no_comparison() -> None:
    leaf = make(47, 123, 128).leaves()
    got = kd(leaf, 2.0, only("cross_entropy"), chunk_tokens=10, vocab_size=123)
    assert got.terms == {}
    assert got.loss_sum.item() == got.ce_sum.item() == pytest.approx(ce_sums(leaf, 123)[0], rel=1e-12)
    got.loss_sum.backward()
    grad_hidden, grad_weight = gradients({}, 1.0, leaf, 123, 2.0)
    assert_close(leaf.hidden_NH.grad, grad_hidden, rtol=1e-10, atol=1e-12)
    assert_close(leaf.weight_VH.grad, grad_weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [*LOSSES, "cross_entropy"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradcheck(temperature: float, name: str) -> None:
    leaf = make(5, 9, 12, width=4, teacher_width=3, scale=1.0).leaves()
    fractional_N = torch.linspace(0, 1, 5, dtype=torch.float64)

    def loss(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        case = Case(
            hidden_NH, weight_VH, leaf.teacher_NG, leaf.teacher_VG, leaf.labels_N.clamp(min=0), fractional_N
        )  # fmt: skip
        return kd(case, temperature, only(name), chunk_tokens=2, vocab_size=9).loss_sum

    assert torch.autograd.gradcheck(loss, (leaf.hidden_NH, leaf.weight_VH))


@pytest.mark.parametrize(("tokens", "vocab", "rows", "chunk"), SHAPES)
def test_linear_ce_sum_is_cross_entropy_with_its_gradient(tokens: int, vocab: int, rows: int, chunk: int) -> None:
    case = make(tokens, vocab, rows)
    leaf = case._replace(mask_N=case.mask_N * torch.linspace(0.5, 1, tokens).double()).leaves()
    head = head_of(leaf, chunk_tokens=chunk, vocab_size=vocab)
    got = linear_ce_sum(leaf.hidden_NH, head, leaf.labels_N, leaf.mask_N)
    assert_close(got.item(), ce_sums(leaf, vocab)[0], rtol=1e-12, atol=1e-12)
    (3 * got).backward()
    grad_hidden, grad_weight = gradients({}, 3.0, leaf, vocab, 1.0)
    assert_close(leaf.hidden_NH.grad, grad_hidden, rtol=1e-10, atol=1e-12)
    assert_close(leaf.weight_VH.grad, grad_weight, rtol=1e-10, atol=1e-12)
    with torch.no_grad(), Recorder() as seen:
        linear_ce_sum(leaf.hidden_NH, head, leaf.labels_N, leaf.mask_N)
    assert seen.products == -(-tokens // chunk)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand(dtype: torch.dtype, name: str) -> None:
    # The first hidden unit times +-1 is the logit itself, exact in every dtype.
    signs_V = torch.tensor([1.0, -1, 1, -1, -1, 1, 1], dtype=dtype)
    weight_VH = torch.stack([signs_V, torch.arange(7, dtype=dtype)], dim=1)
    hidden_NH = torch.tensor([[1e4, 1], [-1e4, 2], [1e4, 0]], dtype=dtype)
    teacher_NG = torch.tensor([[1e4, 2], [-1e4, 1], [-1e4, 0]], dtype=dtype)
    labels_N = torch.tensor([1, 4, 6])
    leaf = Case(hidden_NH, weight_VH, teacher_NG, weight_VH.clone(), labels_N, torch.ones(3, dtype=dtype)).leaves()
    got = kd(leaf, 1.0, only(name), chunk_tokens=2, vocab_size=7)
    wide = Case(*[x if x is labels_N else x.detach().double() for x in leaf])
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    assert_close(sums(got).double(), wanted(name, wide, 7, 1.0), **tolerance)
    got.loss_sum.backward()
    if name == "jsd" or name == "skewed_kl":  # the reference takes the logarithm of a mixture that underflows
        assert leaf.hidden_NH.grad.isfinite().all() and leaf.weight_VH.grad.isfinite().all()
        return
    grad_hidden, grad_weight = gradients({name: 1.0}, 0.0, wide, 7, 1.0)
    scale = max(1.0, float(grad_hidden.abs().max()))
    assert_close(leaf.hidden_NH.grad.double(), grad_hidden, rtol=tolerance["rtol"], atol=scale * tolerance["atol"])
    scale = max(1.0, float(grad_weight.abs().max()))  # entries reach 1e4, of the squared error 1e8
    assert_close(leaf.weight_VH.grad.double(), grad_weight, rtol=1e-5, atol=scale * 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_teacher_equal_to_student_gives_zero(dtype: torch.dtype, temperature: float, name: str) -> None:
    case = make(47, 123, 128)
    hidden_NH, weight_VH = case.hidden_NH.to(dtype), case.weight_VH.to(dtype)
    leaf = case._replace(hidden_NH=hidden_NH, weight_VH=weight_VH, teacher_NG=hidden_NH, teacher_VG=weight_VH).leaves()
    got = kd(leaf, temperature, only(name), chunk_tokens=10, vocab_size=123)
    got.loss_sum.backward()
    # Exactly 0 where the definition subtracts equal numbers; a mixture and a cosine are rounded.
    limit = 0.0 if name in ("forward_kl", "reverse_kl", "mse") else 47 * 1e-6
    assert abs(got.loss_sum.item()) <= limit * temperature**2
    assert got.ce_sum.item() == got.teacher_ce_sum.item() > 0
    assert leaf.hidden_NH.grad.abs().max() <= limit and leaf.weight_VH.grad.abs().max() <= limit


def test_chunk_size_changes_nothing() -> None:
    results = []
    for chunk in (1, 7, 47, 1000):
        leaf = make(47, 123, 128).leaves()
        got = kd(leaf, 2.0, chunk_tokens=chunk, vocab_size=123)
        got.loss_sum.backward()
        results.append([*sums(got), leaf.hidden_NH.grad, leaf.weight_VH.grad])
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_bf16_weight_gradient_is_summed_in_float32() -> None:
    case = make(400, 23, 23)
    half = Case(*[x.bfloat16() if x.is_floating_point() else x for x in case])
    leaf = half.leaves()
    got = kd(leaf, chunk_tokens=1, vocab_size=23)
    got.loss_sum.backward()
    assert got.loss_sum.dtype == torch.float32
    assert leaf.weight_VH.grad.dtype == leaf.hidden_NH.grad.dtype == torch.bfloat16
    wide = Case(*[x.double() if x.is_floating_point() else x for x in half])
    assert_close(got.loss_sum.item(), loss_sum("forward_kl", wide, 23, 1.0), rtol=5e-3, atol=0)
    want_grads = gradients({"forward_kl": 1.0}, 0.0, wide, 23, 1.0)
    for grad, want in zip((leaf.hidden_NH.grad, leaf.weight_VH.grad), want_grads, strict=True):
        # 400 additions in bf16 would lose about 3 %.
        assert (grad.double() - want).norm() < 0.01 * want.norm()


class Recorder(TorchDispatchMode):
    """A recorder counts matrix products and takes the size of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(("hidden", "weight", "products"), [(0, 0, 2), (1, 0, 3), (0, 1, 3), (1, 1, 4)])
def test_only_wanted_gradients_are_computed(hidden: bool, weight: bool, products: int) -> None:
    case = make(300, 200, 200)
    case.hidden_NH.requires_grad_(bool(hidden))
    case.weight_VH.requires_grad_(bool(weight))
    with Recorder() as seen:
        kd(case, chunk_tokens=10, vocab_size=200)
    assert seen.products == 30 * products
    assert seen.largest <= max(300 * 37, 200 * 37)  # inputs; full logits would be 300 * 200
    with torch.no_grad(), Recorder() as seen:
        kd(case, chunk_tokens=10, vocab_size=200)
    assert seen.products == 30 * 2


def test_inputs_stay_as_they_are() -> None:
    case = make(47, 123, 128)
    before = [x.clone() for x in case]
    cfg = LossConfig(**dict.fromkeys(LOSSES, 1.0), cross_entropy=1.0)
    kd(case.leaves(), 2.0, cfg, chunk_tokens=10, vocab_size=123).loss_sum.backward()
    linear_ce(case.hidden_NH, head_of(case, chunk_tokens=10, vocab_size=123), case.labels_N, case.mask_N)
    assert_close(list(case), before, rtol=0, atol=0)


def test_linear_ce_is_cross_entropy() -> None:
    case = make(47, 123, 128)
    case.weight_VH.requires_grad_()
    got = linear_ce(case.hidden_NH, head_of(case, chunk_tokens=10, vocab_size=123), case.labels_N, case.mask_N)
    want = [-log_softmax(student)[label] for student, _, label, _ in rows(case, 123)]
    assert_close(got[case.mask_N > 0], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert not got[case.mask_N == 0].any()
    assert not got.requires_grad


def test_bad_input_is_named() -> None:
    case = make(5, 9, 12)
    with pytest.raises(ConfigError, match="distill.temperature=0"):
        kd(case, 0.0, chunk_tokens=2, vocab_size=9)
    with pytest.raises(ConfigError, match="chunk_tokens=0"):
        kd(case, chunk_tokens=0, vocab_size=9)
    with pytest.raises(DataError, match="teacher tokens=4"):
        kd(case._replace(teacher_NG=case.teacher_NG[:4]), chunk_tokens=2, vocab_size=9)
    with pytest.raises(DataError, match=r"must both be \[5\]"):
        kd(case._replace(mask_N=case.mask_N[:4]), chunk_tokens=2, vocab_size=9)
    for name in (*LOSSES, "cross_entropy"):
        with pytest.raises(ConfigError, match=f"distill.loss.{name}=-1"):
            only(name, -1.0)
    with pytest.raises(ConfigError, match="no weight > 0"):
        LossConfig(forward_kl=0)
    with pytest.raises(ConfigError, match="jsd_beta=1"):
        LossConfig(jsd_beta=1)
    with pytest.raises(ConfigError, match="skew=1"):
        LossConfig(skew=1)


@pytest.mark.parametrize("label", [9, -100])
def test_a_label_outside_the_vocabulary_is_no_number(label: int) -> None:
    case = make(5, 9, 12)._replace(mask_N=torch.ones(5))
    case.labels_N[:] = 1
    case.labels_N[3] = label
    settings = {"chunk_tokens": 2, "vocab_size": 9}
    got = kd(case, **settings)
    assert got.ce_sum.isnan() and got.teacher_ce_sum.isnan() and got.terms["forward_kl"].isfinite()
    losses_N = linear_ce(case.hidden_NH, head_of(case, **settings), case.labels_N, case.mask_N)
    assert losses_N.isnan().tolist() == [False, False, False, True, False]


def _tp_matches(rank: int, world: int, vocab: int, temperature: float) -> None:
    case = make(47, vocab, 128)
    size = 128 // world
    shard = slice(rank * size, (rank + 1) * size)
    where = {"vocab_size": vocab, "vocab_start": rank * size, "tp_group": dist.group.WORLD, "chunk_tokens": 10}
    for name in LOSSES:
        leaf = case._replace(weight_VH=case.weight_VH[shard], teacher_VG=case.teacher_VG[shard]).leaves()
        cfg = replace(only(name), cross_entropy=0.5)
        got = kd(leaf, temperature, cfg, **where)
        got.loss_sum.backward()
        want = wanted(name, case, vocab, temperature)
        assert_close(sums(got), want, rtol=1e-11, atol=1e-12)
        assert_close(got.loss_sum.detach(), want[0] + 0.5 * want[1], rtol=1e-11, atol=1e-12)
        grad_hidden, grad_weight = gradients({name: 1.0}, 0.5, case, vocab, temperature)
        assert_close(leaf.hidden_NH.grad, grad_hidden, rtol=1e-9, atol=1e-11)
        assert_close(leaf.weight_VH.grad, grad_weight[shard], rtol=1e-9, atol=1e-11)
    alone = case._replace(weight_VH=case.weight_VH[shard]).leaves()
    head = head_of(alone, **where)
    ce_N = linear_ce(case.hidden_NH, head, case.labels_N, case.mask_N)
    assert_close(ce_N.sum(), want[1], rtol=1e-12, atol=1e-12)
    got = linear_ce_sum(alone.hidden_NH, head, alone.labels_N, alone.mask_N)
    got.backward()
    assert_close(got.detach(), want[1], rtol=1e-12, atol=1e-12)
    grad_hidden, grad_weight = gradients({}, 1.0, case, vocab, 1.0)
    assert_close(alone.hidden_NH.grad, grad_hidden, rtol=1e-10, atol=1e-12)
    assert_close(alone.weight_VH.grad, grad_weight[shard], rtol=1e-10, atol=1e-12)
    # The same collectives with logits far apart between the ranks: a local maximum would overflow or vanish.
    far = case._replace(hidden_NH=case.hidden_NH * 3e3)
    ce_N = linear_ce(far.hidden_NH, head, far.labels_N, far.mask_N)
    assert_close(ce_N.sum().item(), ce_sums(far, vocab)[0], rtol=1e-10, atol=0)


# 60 of 128 rows: with four ranks two of them hold padding only.
@pytest.mark.parametrize(("world", "vocab", "temperature"), [(2, 123, 2.0), (4, 123, 1.0), (4, 60, 0.5)])
def test_tensor_parallel_matches_one_rank(tmp_path: Path, world: int, vocab: int, temperature: float) -> None:
    run_ranks(_tp_matches, world, tmp_path, vocab, temperature)


def _collectives(rank: int, world: int) -> None:
    tensor = torch.arange(6.0).view(2, 3).T * (rank + 1)  # not contiguous
    before = tensor.clone()
    base = torch.arange(6.0).view(2, 3).T
    assert_close(all_reduce_sum(tensor, dist.group.WORLD), base * 3, rtol=0, atol=0)
    assert_close(all_reduce_max(tensor, dist.group.WORLD), base * 2, rtol=0, atol=0)
    assert_close(tensor, before, rtol=0, atol=0)
    assert broadcast_object({"rank": rank}, src=1) == {"rank": 1}
    assert gather_objects(rank) == ([0, 1] if rank == 0 else [])


def test_collectives(tmp_path: Path) -> None:
    run_ranks(_collectives, 2, tmp_path)
    one = torch.ones(2)
    assert all_reduce_sum(one, None) is not one and all_reduce_sum(one, None).equal(one)
    assert broadcast_object("a") == "a" and gather_objects("a") == ["a"]


def _blocks(rank: int, world: int) -> None:
    logits_NV = torch.zeros(100, 2**18)
    shard = VocabShard(2**18 * world, 0, dist.group.WORLD)
    rows = [block.stop - block.start for block in cache_blocks(logits_NV, shard)]
    assert rows == ([4] * 25 if world == 1 else [100])  # 4 MiB; every block more is a message to the other ranks


@pytest.mark.parametrize("world", [1, 2])
def test_blocks_fit_a_cache_where_no_other_rank_waits(tmp_path: Path, world: int) -> None:
    run_ranks(_blocks, world, tmp_path)


def _one_rank_fails(rank: int, world: int) -> None:
    assert rank == 0, "rank one says no"


def test_a_failing_rank_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rank one says no"):
        run_ranks(_one_rank_fails, 2, tmp_path)
