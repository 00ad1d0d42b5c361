"""The losses by kernels against the definition in float64; in Triton's interpreter where there is no GPU.

Hidden states are the unit vectors, so that logits are entries of the heads, exact in every dtype, and what is compared
is the arithmetic of the losses. The bounds of the errors are worked out at `check`.

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

pytest.importorskip("triton")

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.losses import kernels
from compactlm_nemo.losses.linear_ce import linear_ce, linear_ce_sum
from compactlm_nemo.losses.linear_kd import LinearKD, linear_kd
from compactlm_nemo.losses.targets import NoTargets, Targets, TeacherHead, TopK, top_k_targets
from compactlm_nemo.losses.vocabulary import Head, VocabShard
from tests.losses.reference import BETA, LOSSES, SKEW, Case, ce_sums, gradients, log_softmax, loss_sum, make, rows
from tests.losses.test_targets import naive_gradients, naive_sum, top_k
from tests.support.ranks import run_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

VOCAB, ROWS = 123, 128
MIX = LossConfig(
    forward_kl=0.5, reverse_kl=0.7, jsd=1.5, skewed_kl=0.3, mse=0.2, cosine=2.0, cross_entropy=0.4,
    jsd_beta=BETA, skew=SKEW,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 32)


def exact(tokens: int, vocab: int, num_rows: int, dtype: torch.dtype, scale: float = 3.0) -> Case:
    """Makes a case whose hidden states are unit vectors; the second of three tokens has weight 0.5, the third none."""
    case = make(tokens, vocab, num_rows, width=max(tokens, 1), teacher_width=max(tokens, 1), scale=1.0)
    unit_NH = torch.eye(max(tokens, 1))[:tokens]
    mask_N = torch.tensor([1.0, 0.5, 0.0]).repeat(tokens)[:tokens]
    generator = torch.Generator().manual_seed(vocab)
    labels_N = torch.randint(vocab, (tokens,), generator=generator)
    floats = unit_NH, scale * case.weight_VH, unit_NH, scale * case.teacher_VG
    student, weight, teacher, teacher_weight = (each.to(DEVICE, dtype) for each in floats)
    labels_N = torch.where(mask_N > 0, labels_N, -100).to(DEVICE)
    return Case(student, weight, teacher, teacher_weight, labels_N, mask_N.to(DEVICE))


def wide(case: Case) -> Case:
    return Case(*[x.detach().cpu().double() if x.is_floating_point() else x.cpu() for x in case])


def run(case: Case, targets: Targets, loss: LossConfig, temperature: float = 1.0, **shard: Any) -> LinearKD:
    """Calls `linear_kd` by kernels, two tokens a chunk, forward and backward."""
    head = Head(case.weight_VH, VocabShard(**shard), chunk_tokens=2, fused=True)
    got = linear_kd(
        case.hidden_NH, head, targets, case.labels_N, case.mask_N, loss=loss, temperature=temperature
    )  # fmt: skip
    got.loss_sum.backward()
    return got


def teacher_of(case: Case) -> TeacherHead:
    return TeacherHead(case.teacher_NG, case.teacher_VG)


def noise(case: Case, loss: LossConfig, temperature: float) -> float:
    """Bounds the float32 error of one token's loss, and of the gradient to a logit.

    Logarithms of probabilities, their differences and logits over T stay below `size`, each rounded a few times, and
    everything else is a probability or a share times them; the squared error squares them.
    """
    size = 2 * float(max(case.weight_VH.abs().max(), case.teacher_VG.abs().max())) + 5
    weights = loss.forward_kl + loss.reverse_kl + loss.jsd + loss.skewed_kl + loss.cosine + loss.cross_entropy
    return 8 * 2**-24 * max(temperature, 1) ** 2 * (weights * size + loss.mse * size**2)


def assert_gradients(
    got: tuple[Tensor, Tensor], want: list[Tensor], case: Case, error: float, shard: slice = slice(None)
) -> None:
    """A gradient to a logit is rounded once to the dtype, and one to the head is that; `case` is the wide one.

    One to a hidden state is a sum over the vocabulary of such, rounded again, and under tensor parallelism added in the
    dtype by at most four ranks.
    """
    # Half of the last place; but Triton's interpreter cuts bf16 off.
    unit = torch.finfo(got[0].dtype).eps / (2 if DEVICE == "cuda" else 1)
    hidden_NH, weight_VH = (each.cpu().double() for each in got)
    want_VH = want[1][shard]
    assert ((weight_VH - want_VH).abs() <= unit * want_VH.abs() + error).all()
    # Hidden states are unit vectors, so the head's gradient is that of the logits, transposed.
    spread_NH = want[1].abs().T @ case.weight_VH.abs()
    bound_NH = 5 * unit * spread_NH + error * case.weight_VH.abs().sum(dim=0) + unit * want[0].abs()
    assert ((hidden_NH - want[0]).abs() <= bound_NH).all()


def check(case: Case, loss: LossConfig, temperature: float, vocab: int) -> None:
    leaf, case64 = case.leaves(), wide(case)
    got = run(leaf, teacher_of(leaf), loss, temperature, vocab_size=vocab)
    tokens = max(len(case.mask_N), 1)
    weights = {name: getattr(loss, name) for name in LOSSES if getattr(loss, name)}
    assert got.terms.keys() == weights.keys()
    for name, weight in weights.items():
        alone = LossConfig(**{"forward_kl": 0.0, name: 1.0})
        error = tokens * noise(case64, alone, temperature)
        assert got.terms[name].item() == pytest.approx(loss_sum(name, case64, vocab, temperature), rel=0, abs=error)
        assert weight
    error = tokens * noise(case64, LossConfig(), 1.0)
    assert (got.ce_sum.item(), got.teacher_ce_sum.item()) == pytest.approx(ce_sums(case64, vocab), rel=0, abs=error)
    terms = {**got.terms, "cross_entropy": got.ce_sum}
    total = sum(getattr(loss, name) * float(term) for name, term in terms.items())
    assert got.loss_sum.item() == pytest.approx(total, rel=1e-6, abs=1e-6)
    want = gradients(weights, loss.cross_entropy, case64, vocab, temperature)
    assert leaf.hidden_NH.grad.dtype == leaf.weight_VH.grad.dtype == case.hidden_NH.dtype
    error = noise(case64, loss, temperature)
    assert_gradients((leaf.hidden_NH.grad, leaf.weight_VH.grad), want, case64, error)
    assert not leaf.weight_VH.grad[vocab:].any() and not leaf.hidden_NH.grad[leaf.mask_N == 0].any()


def only(name: str, weight: float = 1.0) -> LossConfig:
    return LossConfig(**{"forward_kl": 0.0, name: weight}, jsd_beta=BETA, skew=SKEW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [*LOSSES, "cross_entropy"])
def test_every_loss_is_the_definition(name: str, temperature: float, dtype: torch.dtype) -> None:
    check(exact(3, VOCAB, ROWS, dtype), only(name, 0.7), temperature, VOCAB)


# A block is 32 entries: fewer than one, one, an entry more, and rows that only pad the vocabulary.
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("tokens", "vocab", "num_rows"), [(1, 5, 5), (2, 32, 64), (3, 33, 33), (4, 95, 96)])
def test_all_losses_together_on_any_shape(tokens: int, vocab: int, num_rows: int, temperature: float) -> None:
    check(exact(tokens, vocab, num_rows, torch.float32), MIX, temperature, vocab)


def test_a_mixture_without_the_teacher_is_the_forward_kl() -> None:
    case, losses = exact(2, 40, 40, torch.float32).leaves(), []
    for loss in (only("forward_kl"), replace(only("skewed_kl"), skew=0.0)):
        losses.append(run(case, teacher_of(case), loss, 2.0, vocab_size=40).loss_sum.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert case.weight_VH.grad.isfinite().all()


def test_no_token_gives_zero() -> None:
    case = exact(0, 40, 48, torch.bfloat16).leaves()
    got = run(case, teacher_of(case), MIX, vocab_size=40)
    assert got.loss_sum == got.ce_sum == 0 and not case.weight_VH.grad.any() and case.hidden_NH.grad.shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teacher_equal_to_student_gives_zero(dtype: torch.dtype, temperature: float) -> None:
    case = exact(2, VOCAB, ROWS, dtype)
    for loss in (only("forward_kl"), only("reverse_kl"), only("mse")):
        leaf = case._replace(teacher_VG=case.weight_VH).leaves()
        got = run(leaf, teacher_of(leaf), loss, temperature, vocab_size=VOCAB)
        assert got.loss_sum == 0 and got.ce_sum == got.teacher_ce_sum > 0
        assert not leaf.hidden_NH.grad.any() and not leaf.weight_VH.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_logits_of_ten_thousand(name: str) -> None:
    signs_V = torch.tensor([1.0, -1, 1, -1, -1, 1, 1])
    weight_VH = torch.stack([signs_V, torch.arange(7.0)], dim=1)
    hidden_NH = torch.tensor([[1e4, 1], [-1e4, 2], [1e4, 0]])
    teacher_NG = torch.tensor([[1e4, 2], [-1e4, 1], [-1e4, 0]])
    case = Case(hidden_NH, weight_VH, teacher_NG, weight_VH, torch.tensor([1, 4, 6]), torch.ones(3))
    leaf = Case(*[each.to(DEVICE) for each in case]).leaves()
    got = run(leaf, teacher_of(leaf), only(name), vocab_size=7)
    value = loss_sum(name, wide(case), 7, 1.0)
    assert got.loss_sum.item() == pytest.approx(value, rel=1e-6, abs=1e-6)
    for grad in (leaf.hidden_NH.grad, leaf.weight_VH.grad):
        assert grad.isfinite().all()
    if name not in ("jsd", "skewed_kl"):  # the reference takes the logarithm of a mixture that underflows
        for grad, want in zip(
            (leaf.hidden_NH.grad, leaf.weight_VH.grad), gradients({name: 1.0}, 0.0, wide(case), 7, 1.0), strict=True
        ):
            assert_close(grad.cpu().double(), want, rtol=1e-5, atol=1e-6 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("label", [40, -100])
def test_a_label_outside_the_vocabulary_is_no_number(label: int) -> None:
    case = exact(2, 40, 48, torch.float32).leaves()._replace(mask_N=torch.ones(2, device=DEVICE))
    case.labels_N[1] = label
    got = run(case, teacher_of(case), LossConfig(), vocab_size=40)
    assert got.ce_sum.isnan() and got.teacher_ce_sum.isnan() and got.terms["forward_kl"].isfinite()
    head = Head(case.weight_VH, VocabShard(40), chunk_tokens=2, fused=True)
    assert linear_ce(case.hidden_NH, head, case.labels_N, case.mask_N).isnan().tolist() == [False, True]


def check_cross_entropy(case: Case, vocab: int, head: Head, shard: slice = slice(None)) -> None:
    """Training without a teacher, and the loss of each token."""
    leaf, case64 = case._replace(weight_VH=head.weight_VH).leaves(), wide(case)
    error = noise(case64, only("cross_entropy"), 1.0)
    ce_N = linear_ce(leaf.hidden_NH, head, leaf.labels_N, leaf.mask_N)
    want = [-log_softmax(student)[label] * mask for student, _, label, mask in rows(case64, vocab)]
    assert ce_N[case.mask_N > 0].tolist() == pytest.approx(want, rel=0, abs=error)
    assert not ce_N[case.mask_N == 0].any()
    leaf_head = replace(head, weight_VH=leaf.weight_VH)
    ce_sum = linear_ce_sum(leaf.hidden_NH, leaf_head, leaf.labels_N, leaf.mask_N)
    ce_sum.backward()
    assert ce_sum.item() == pytest.approx(sum(want), rel=0, abs=len(want) * error)
    got = (leaf.hidden_NH.grad, leaf.weight_VH.grad)
    assert_gradients(got, gradients({}, 1.0, case64, vocab, 1.0), case64, error, shard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_alone_is_the_definition(dtype: torch.dtype) -> None:
    case = exact(5, VOCAB, ROWS, dtype)
    check_cross_entropy(case, VOCAB, Head(case.weight_VH, VocabShard(VOCAB), chunk_tokens=2, fused=True))


def check_top_k(case: Case, k: int, head: Head, ce_weight: float, shard: slice = slice(None)) -> None:
    """Stored targets, and the search for them."""
    case64, leaf = wide(case), case._replace(weight_VH=head.weight_VH).leaves()
    stored = top_k(case64, k)
    targets = TopK(*(each.to(DEVICE) for each in stored))
    loss = LossConfig(forward_kl=0.7, cross_entropy=ce_weight)
    got = linear_kd(
        leaf.hidden_NH, replace(head, weight_VH=leaf.weight_VH), targets, leaf.labels_N, leaf.mask_N, loss=loss
    )  # fmt: skip
    got.loss_sum.backward()
    error = len(case.mask_N) * noise(case64, loss, 1.0)
    assert got.terms["forward_kl"].item() == pytest.approx(naive_sum(case64, k), rel=0, abs=error)
    assert (got.ce_sum.item(), got.teacher_ce_sum.item()) == pytest.approx(ce_sums(case64, VOCAB), rel=0, abs=error)
    parts = zip(naive_gradients(case64, stored), gradients({}, 1.0, case64, VOCAB, 1.0), strict=True)
    want = [0.7 * kl + ce_weight * ce for kl, ce in parts]
    assert_gradients((leaf.hidden_NH.grad, leaf.weight_VH.grad), want, case64, error, shard)
    found = top_k_targets(
        case.teacher_NG, replace(head, weight_VH=case.teacher_VG[shard]), case.labels_N.clamp(min=0), k=k
    )  # fmt: skip
    by_id = found.ids_NK.argsort(-1), stored.ids_NK.to(DEVICE).argsort(-1)
    assert found.ids_NK.gather(-1, by_id[0]).equal(targets.ids_NK.gather(-1, by_id[1]))
    probs = found.probs_NK.gather(-1, by_id[0]), targets.probs_NK.gather(-1, by_id[1])
    assert_close(probs[0].double(), probs[1], rtol=1e-5, atol=0)
    assert_close([found.rest_N.double(), found.ce_N.double()], [targets.rest_N, targets.ce_N], rtol=1e-5, atol=1e-20)


@pytest.mark.parametrize(("k", "ce_weight"), [(1, 0.0), (5, 0.4), (VOCAB, 0.4)])
def test_stored_tokens_are_the_definition(k: int, ce_weight: float) -> None:
    case = exact(3, VOCAB, ROWS, torch.float32)
    check_top_k(case, k, Head(case.weight_VH, VocabShard(VOCAB), chunk_tokens=2, fused=True), ce_weight)


def test_stored_tokens_in_bf16_lose_only_what_rounds_the_gradient() -> None:
    case = exact(3, VOCAB, ROWS, torch.bfloat16)
    case64, leaf, loss = wide(case), case.leaves(), LossConfig(forward_kl=0.7, cross_entropy=0.4)
    stored = top_k(case64, 5)
    got = run(leaf, TopK(*(each.to(DEVICE) for each in stored)), loss, vocab_size=VOCAB)
    error = 3 * noise(case64, loss, 1.0)
    assert got.terms["forward_kl"].item() == pytest.approx(naive_sum(case64, 5), rel=0, abs=error)
    parts = zip(naive_gradients(case64, stored), gradients({}, 0.4, case64, VOCAB, 1.0), strict=True)
    want = [0.7 * kl + ce for kl, ce in parts]
    assert_gradients((leaf.hidden_NH.grad, leaf.weight_VH.grad), want, case64, error)


def _tp_matches(rank: int, world: int, vocab: int) -> None:
    kernels.BLOCK = 16
    size = ROWS // world
    shard, group = slice(rank * size, (rank + 1) * size), dist.group.WORLD
    where = {"vocab_size": vocab, "vocab_start": rank * size, "tp_group": group}
    for dtype, temperature in ((torch.float32, 2.0), (torch.bfloat16, 1.0)):
        case = exact(3, vocab, ROWS, dtype)
        leaf = case._replace(weight_VH=case.weight_VH[shard], teacher_VG=case.teacher_VG[shard]).leaves()
        case64 = wide(case)
        got = run(leaf, teacher_of(leaf), MIX, temperature, **where)
        for name, term in got.terms.items():
            error = 3 * noise(case64, LossConfig(**{"forward_kl": 0.0, name: 1.0}), temperature)
            assert term.item() == pytest.approx(loss_sum(name, case64, vocab, temperature), rel=0, abs=error)
        weights = {name: getattr(MIX, name) for name in LOSSES}
        want = gradients(weights, MIX.cross_entropy, case64, vocab, temperature)
        error = noise(case64, MIX, temperature)
        assert_gradients((leaf.hidden_NH.grad, leaf.weight_VH.grad), want, case64, error, shard)
        head = Head(case.weight_VH[shard], VocabShard(**where), chunk_tokens=2, fused=True)
        check_cross_entropy(case, vocab, head, shard)
        # Logits far apart between the ranks: sums relative to a local maximum overflow or vanish.
        far = case._replace(weight_VH=(case.weight_VH * 2**11)[shard])
        ce_N = linear_ce(far.hidden_NH, replace(head, weight_VH=far.weight_VH), far.labels_N, far.mask_N)
        far64 = wide(case._replace(weight_VH=case.weight_VH * 2**11))
        assert ce_N.sum().item() == pytest.approx(ce_sums(far64, vocab)[0], rel=1e-5)
    if vocab == VOCAB:
        case = exact(3, VOCAB, ROWS, torch.float32)
        head = Head(case.weight_VH[shard], VocabShard(**where), chunk_tokens=2, fused=True)
        for k in (5, 40):  # 40 is more than one of four ranks holds
            check_top_k(case, k, head, 0.4, shard)


# 60 of 128 rows: with four ranks two of them hold padding only.
@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks need the interpreter")
@pytest.mark.parametrize(("world", "vocab"), [(2, VOCAB), (4, VOCAB), (4, 60)])
def test_tensor_parallel_matches_one_rank(tmp_path: Path, world: int, vocab: int) -> None:
    run_ranks(_tp_matches, world, tmp_path, vocab)


def test_float64_stays_with_the_definition() -> None:
    case = exact(2, 40, 48, torch.float64)
    head = Head(case.weight_VH, VocabShard(40), chunk_tokens=2, fused=True)
    assert not head.is_fused(case.hidden_NH) and head.is_fused(case.hidden_NH.float())
    assert not replace(head, fused=None).is_fused(case.hidden_NH.cpu().float())
    got = run(case.leaves(), NoTargets(2), only("cross_entropy"), vocab_size=40)
    assert got.ce_sum.dtype == torch.float64
