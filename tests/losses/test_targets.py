"""Stored top-k targets against the definition over k + 1 outcomes, and against the teacher that they were taken from.

Shape suffixes: N tokens, V vocabulary, K stored entries, H student width.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.losses.linear_kd import LinearKD, linear_kd
from compactlm_nemo.losses.targets import TopK, top_k_targets
from compactlm_nemo.losses.vocabulary import Head, VocabShard
from tests.losses.reference import Case, ce_sums, gradients, log_softmax, loss_sum, make, rows
from tests.support.ranks import run_ranks

VOCAB, ROWS, TOKENS = 123, 128, 47


def top_k(case: Case, k: int) -> TopK:
    """Makes targets from Python floats; the order of the entries is no part of the format, so it is shuffled."""
    ids, probs, rest, ce = [], [], [], []
    labels = case.labels_N.clamp(min=0).tolist()
    for teacher, label in zip((case.teacher_NG @ case.teacher_VG[:VOCAB].T).tolist(), labels, strict=True):
        log_p = log_softmax(teacher)
        order = sorted(range(VOCAB), key=lambda v: -log_p[v])
        ids_K = sorted(order[:k], key=lambda v: (v * 31) % VOCAB)
        ids.append(ids_K)
        probs.append([math.exp(log_p[v]) for v in ids_K])
        rest.append(math.fsum(math.exp(log_p[v]) for v in order[k:]))
        ce.append(-log_p[label])
    return TopK(torch.tensor(ids), *(torch.tensor(x, dtype=torch.float64) for x in (probs, rest, ce)))


def stored(case: Case, targets: TopK, weight: float = 1.0, shard: VocabShard | None = None) -> LinearKD:
    head = Head(case.weight_VH, shard or VocabShard(VOCAB), chunk_tokens=10)
    loss = LossConfig(forward_kl=weight)
    return linear_kd(case.hidden_NH, head, targets, case.labels_N, case.mask_N, loss=loss)


def naive_sum(case: Case, k: int) -> float:
    """Returns the KL over k + 1 outcomes in Python floats."""
    total = []
    for student, teacher, _, mask in rows(case, VOCAB):
        log_q, log_p = log_softmax(student), log_softmax(teacher)
        order = sorted(range(VOCAB), key=lambda v: -log_p[v])
        outcomes = [(math.exp(log_p[v]), math.exp(log_q[v])) for v in order[:k]]
        if k < VOCAB:
            outcomes.append(tuple(math.fsum(math.exp(x[v]) for v in order[k:]) for x in (log_p, log_q)))
        total.append(mask * math.fsum(p * (math.log(p) - math.log(q)) for p, q in outcomes))
    return math.fsum(total)


def naive_gradients(case: Case, targets: TopK) -> list[Tensor]:
    """Returns autograd's gradients of the plain formula."""
    leaf = case.leaves()
    q_NV = torch.softmax(leaf.hidden_NH @ leaf.weight_VH[:VOCAB].T, dim=-1)
    q_NK = q_NV.gather(-1, targets.ids_NK)
    kl_N = (targets.probs_NK * (targets.probs_NK.log() - q_NK.log())).sum(-1)
    outside_NV = torch.ones_like(q_NV).scatter(-1, targets.ids_NK, 0)
    kl_N = kl_N - targets.rest_N * (q_NV * outside_NV).sum(-1).clamp(min=1e-300).log()
    (kl_N * case.mask_N).sum().backward()
    return [leaf.hidden_NH.grad, leaf.weight_VH.grad]


@pytest.mark.parametrize("k", [1, 5, 40])
def test_top_k_is_the_definition_over_k_plus_one_outcomes(k: int) -> None:
    case = make(TOKENS, VOCAB, ROWS)
    targets, leaf = top_k(case, k), case.leaves()
    got = stored(leaf, targets, 0.7)
    assert got.terms["forward_kl"].item() == pytest.approx(naive_sum(case, k), rel=1e-11)
    assert got.loss_sum.item() == pytest.approx(0.7 * naive_sum(case, k), rel=1e-11)
    assert (got.ce_sum.item(), got.teacher_ce_sum.item()) == pytest.approx(ce_sums(case, VOCAB), rel=1e-11)
    got.loss_sum.backward()
    grad_hidden, grad_weight = naive_gradients(case, targets)
    assert_close(leaf.hidden_NH.grad, 0.7 * grad_hidden, rtol=1e-9, atol=1e-12)
    assert_close(leaf.weight_VH.grad, 0.7 * grad_weight, rtol=1e-9, atol=1e-12)
    assert got.terms["forward_kl"] < loss_sum("forward_kl", case, VOCAB, 1.0)  # merging outcomes never adds


def test_all_of_the_vocabulary_is_the_full_divergence() -> None:
    case = make(TOKENS, VOCAB, ROWS)
    leaf = case.leaves()
    got = stored(leaf, top_k(case, VOCAB))
    assert got.terms["forward_kl"].item() == pytest.approx(loss_sum("forward_kl", case, VOCAB, 1.0), rel=1e-11)
    got.loss_sum.backward()
    grad_hidden, grad_weight = gradients({"forward_kl": 1.0}, 0.0, case, VOCAB, 1.0)
    assert_close(leaf.hidden_NH.grad, grad_hidden, rtol=1e-9, atol=1e-12)
    assert_close(leaf.weight_VH.grad, grad_weight, rtol=1e-9, atol=1e-12)


def test_a_student_that_is_sure_of_the_kept_tokens() -> None:
    """The student's probability outside them, 1e-20, is not what rounding leaves of 1 minus the others."""
    logits = torch.tensor([[46.0, 46.0, 0.0, -1.0]], dtype=torch.float64)
    case = Case(
        torch.ones(1, 1, dtype=torch.float64), logits.T.contiguous(), *[torch.empty(0)] * 2,
        torch.tensor([0]), torch.ones(1),
    ).leaves()  # fmt: skip
    targets = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.4]]), torch.tensor([0.1]), torch.tensor([0.7]))
    head = Head(case.weight_VH, VocabShard(4), chunk_tokens=1)
    got = linear_kd(case.hidden_NH, head, targets, case.labels_N, case.mask_N, loss=LossConfig())
    log_z = math.log(2 * math.exp(46) + 1 + math.exp(-1))
    rest = math.log(1 + math.exp(-1)) - log_z
    want = 0.5 * (math.log(0.5) - 46 + log_z) + 0.4 * (math.log(0.4) - 46 + log_z) + 0.1 * (math.log(0.1) - rest)
    assert got.loss_sum.item() == pytest.approx(want, rel=1e-6)  # the targets are float32
    got.loss_sum.backward()
    q_rest = math.exp(rest)
    gradient = [0.0, 0.1, *(math.exp(x - log_z) * (1 - 0.1 / q_rest) for x in (0, -1))]
    assert case.weight_VH.grad[:, 0].tolist() == pytest.approx(gradient, abs=1e-7)


def finds(case: Case, k: int, shard: VocabShard) -> None:
    """The targets that the ranks find on their shards of the vocabulary are those of the whole vocabulary."""
    num_rows = ROWS // (shard.tp_group.size() if shard.tp_group else 1)
    head = Head(case.teacher_VG[shard.vocab_start :][:num_rows], shard, chunk_tokens=10)
    got = top_k_targets(case.teacher_NG, head, case.labels_N.clamp(min=0), k=k)
    want = top_k(case, k)
    assert_close(got.probs_NK, want.probs_NK.sort(-1, descending=True).values, rtol=1e-11, atol=0)
    order = got.ids_NK.argsort(-1), want.ids_NK.argsort(-1)
    assert got.ids_NK.gather(-1, order[0]).equal(want.ids_NK.gather(-1, order[1]))
    assert_close([got.rest_N, got.ce_N], [want.rest_N, want.ce_N], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("k", [1, 40, VOCAB])
def test_the_likeliest_tokens_are_found(k: int) -> None:
    finds(make(TOKENS, VOCAB, ROWS), k, VocabShard(VOCAB))


def _tp_matches(rank: int, world: int) -> None:
    case = make(TOKENS, VOCAB, ROWS)
    targets, size = top_k(case, 5), ROWS // world
    shard = VocabShard(VOCAB, rank * size, dist.group.WORLD)
    for k in (5, 40, VOCAB):  # 40 is more than one of four ranks holds
        finds(case, k, shard)
    local_rows = slice(rank * size, (rank + 1) * size)
    leaf = case._replace(weight_VH=case.weight_VH[local_rows]).leaves()
    got = stored(leaf, targets, shard=shard)
    assert got.terms["forward_kl"].item() == pytest.approx(naive_sum(case, 5), rel=1e-11)
    got.loss_sum.backward()
    grad_hidden, grad_weight = naive_gradients(case, targets)
    assert_close(leaf.hidden_NH.grad, grad_hidden, rtol=1e-9, atol=1e-12)
    assert_close(leaf.weight_VH.grad, grad_weight[local_rows], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_top_k_on_a_sharded_vocabulary_matches_one_rank(tmp_path: Path, world: int) -> None:
    run_ranks(_tp_matches, world, tmp_path)
