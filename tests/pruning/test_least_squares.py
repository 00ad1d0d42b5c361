"""Least squares and backward elimination against numpy on the tokens themselves."""

from __future__ import annotations

from itertools import product

import numpy
import pytest
import torch

from compactlm_nemo.pruning.elimination import eliminate
from compactlm_nemo.pruning.least_squares import columns_of, output_error, refit

RIDGE = 1e-3


def problem(inputs: int, tokens: int = 60, outputs: int = 5, seed: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Correlated inputs `[tokens, inputs]` of very different sizes, and a map `[outputs, inputs]`."""
    rng = numpy.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) * rng.uniform(0.1, 10, size=(inputs, 1))
    return rng.normal(size=(tokens, inputs)) @ mixing, rng.normal(size=(outputs, inputs))


def fitted(x: numpy.ndarray, w: numpy.ndarray, kept: list[int], ridge: float) -> numpy.ndarray:
    """argmin |X_k W'^T - X W^T|^2 + d |W' - W_k|^2 by stacking the ridge below the tokens."""
    damping = numpy.sqrt(ridge * (x**2).sum(axis=0).mean())
    rows = numpy.vstack([x[:, kept], damping * numpy.eye(len(kept))])
    wanted = numpy.vstack([x @ w.T, damping * w[:, kept].T])
    return numpy.linalg.lstsq(rows, wanted, rcond=None)[0].T


def cost(x: numpy.ndarray, w: numpy.ndarray, kept: list[int], ridge: float) -> float:
    """The objective that elimination counts: also the removed columns pay the ridge."""
    damping = ridge * (x**2).sum(axis=0).mean()
    gap = w.copy()
    if kept:
        gap[:, kept] -= fitted(x, w, kept, ridge)
    return float(((x @ gap.T) ** 2).sum() + damping * (gap**2).sum())


def torched(x: numpy.ndarray, w: numpy.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(w), torch.from_numpy(x.T @ x)


def test_refit_is_least_squares_on_the_tokens():
    for seed in range(5):
        x, w = problem(12, seed=seed)
        kept = sorted(numpy.random.default_rng(seed).permutation(12)[:7].tolist())
        weight, moment = torched(x, w)
        got = refit(weight, moment, torch.tensor(kept), RIDGE)
        numpy.testing.assert_allclose(got.numpy(), fitted(x, w, kept, RIDGE), rtol=1e-8, atol=1e-10)
        lost = ((x @ w.T - x[:, kept] @ got.numpy().T) ** 2).sum() / ((x @ w.T) ** 2).sum()
        assert output_error(weight, moment, torch.tensor(kept), got) == pytest.approx(lost, rel=1e-8)


def test_nothing_removed_changes_nothing():
    x, w = problem(9)
    weight, moment = torched(x, w)
    assert torch.equal(refit(weight, moment, torch.arange(9), RIDGE), weight)
    assert output_error(weight, moment, torch.arange(9), weight) == 0


def test_a_combination_of_kept_units_is_replaced_exactly():
    x, w = problem(8)
    x[:, 3] = 2 * x[:, 0] - 0.5 * x[:, 7]
    kept = [0, 1, 2, 4, 5, 6, 7]
    weight, moment = torched(x, w)
    got = refit(weight, moment, torch.tensor(kept), 1e-14).numpy()
    numpy.testing.assert_allclose(x[:, kept] @ got.T, x @ w.T, rtol=1e-7, atol=1e-7)
    assert eliminate(weight, moment, 1e-14).order[0] in (0, 3, 7)


def test_silent_inputs_do_no_harm():
    x, w = problem(6)
    x[:, [1, 4]] = 0
    weight, moment = torched(x, w)
    assert eliminate(weight, moment, RIDGE).order[:2].sort().values.tolist() == [1, 4]
    assert refit(torch.ones(2, 3), torch.zeros(3, 3), torch.tensor([0]), RIDGE).isfinite().all()


def greedy(x: numpy.ndarray, w: numpy.ndarray, unit: int, groups: int) -> tuple[list[int], list[float]]:
    """Backward elimination by solving every smaller problem from scratch; each group in turn gives up one unit."""
    per_group = w.shape[1] // unit // groups
    left, order, costs = list(range(per_group * groups)), [], [0.0]

    def without(unit_idx: int) -> float:
        return cost(x, w, [c for u in left if u != unit_idx for c in range(u * unit, (u + 1) * unit)], RIDGE)

    for _, group in product(range(per_group), range(groups)):
        going = min((u for u in left if u // per_group == group), key=without)
        costs.append(without(going))
        left.remove(going)
        order.append(going)
    return order, costs


@pytest.mark.parametrize(("inputs", "unit", "groups"), [(9, 1, 1), (12, 3, 2), (8, 2, 4)])
def test_elimination_takes_what_costs_least(inputs, unit, groups):
    for seed in range(3):
        x, w = problem(inputs, seed=seed)
        weight, moment = torched(x, w)
        found = eliminate(weight, moment, RIDGE, unit=unit, groups=groups)
        order, costs = greedy(x, w, unit, groups)
        assert found.order.tolist() == order
        numpy.testing.assert_allclose(found.error.numpy(), costs, rtol=1e-7, atol=1e-7)
        kept = found.kept(groups)
        assert (kept // (inputs // unit // groups)).tolist() == list(range(groups))  # one of each group
        assert torch.equal(weight, torch.from_numpy(w))


def test_units_that_go_together_share_their_cost():
    x, w = problem(10)
    weight, moment = torched(x, w)
    found = eliminate(weight, moment, RIDGE, at_once=4)
    assert sorted(found.order.tolist()) == list(range(10))
    for gone in (4, 8, 10):
        assert float(found.error[gone]) == pytest.approx(cost(x, w, found.order[gone:].tolist(), RIDGE), rel=1e-7)
    assert bool((found.error.diff() >= 0).all())


def test_columns_of_units():
    assert columns_of(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
