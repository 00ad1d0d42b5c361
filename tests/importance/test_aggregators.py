"""Aggregators against numpy's own definitions on all data at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compactlm_nemo.config.score import Aggregator
from compactlm_nemo.errors import DataError
from compactlm_nemo.importance import aggregators
from compactlm_nemo.importance.aggregators import State, join_parts, over_sequence, sequence_parts, state_of
from compactlm_nemo.importance.experts import routed_parts
from tests.support.ranks import run_ranks

REFERENCE = {
    Aggregator.mean: lambda x, axis: np.abs(x).mean(axis),
    Aggregator.l2: lambda x, axis: np.linalg.norm(x, axis=axis),
    Aggregator.var: lambda x, axis: np.var(x, axis),
}


def sequence(dtype: torch.dtype) -> torch.Tensor:
    """`[S, B, E]` with a mean far from 0."""
    return (torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0)) * 3 - 100).to(dtype)


@pytest.mark.parametrize("aggs", [set(Aggregator), {Aggregator.l2}, {Aggregator.mean}, {Aggregator.var}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 3 * 15, 2**18])
def test_over_sequence_is_the_definition(aggs, dtype, block, monkeypatch):
    """In blocks of one token, of three of the eight, and of all."""
    monkeypatch.setitem(aggregators.BLOCK_ELEMENTS, "cpu", block)
    x = sequence(dtype)
    kept = x.clone()
    values = over_sequence(sequence_parts(x, aggs), 8)
    assert values.keys() == aggs and torch.equal(x, kept)
    for agg, got in values.items():
        assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype is torch.float64 else 1e-5
        np.testing.assert_allclose(got.double().numpy(), REFERENCE[agg](x.double().numpy(), 0), rtol=tolerance)


def _joins(rank: int, world: int) -> None:
    x = sequence(torch.float64)
    parts = sequence_parts(x[rank * 4 : rank * 4 + 4], set(Aggregator))
    joined, length = join_parts(parts, 4, torch.distributed.group.WORLD)
    assert length == 8
    for agg, got in over_sequence(joined, length).items():
        np.testing.assert_allclose(got.numpy(), REFERENCE[agg](x.numpy(), 0), rtol=1e-12)


def test_parts_of_a_sequence_join(tmp_path):
    run_ranks(_joins, 2, tmp_path)


def test_routed_tokens_are_a_sequence_with_zeros():
    """Seven tokens of three samples, of which the second has one and the third none, in sequences of eight."""
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 10
    samples = torch.tensor([0, 0, 1, 0, 0, 0, 0])
    dense = torch.zeros(8, 3, 5, dtype=torch.float64)
    dense[:6, 0], dense[0, 1] = x[samples == 0], x[2]
    for agg, got in over_sequence(routed_parts(x, samples, 3, 8, set(Aggregator)), 8).items():
        np.testing.assert_allclose(got.numpy(), REFERENCE[agg](dense.numpy(), 0), rtol=1e-12)


def test_samples_of_which_a_part_counts_weigh_as_much():
    rows = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([0.25, 1.0, 0.5, 0.0, 0.125, 1.0, 0.75, 0.0, 0.0])
    parts = [state_of(rows[a:b], weights[a:b, None]) for a, b in ((0, 1), (1, 5), (5, 7), (7, 9))]
    total = parts[3].merged(parts[0]).merged(parts[1]).merged(parts[2])
    mean = (rows * weights[:, None]).sum(0) / 3.625
    assert total.num == 3.625
    np.testing.assert_allclose(total.mean.numpy(), mean.numpy(), rtol=1e-12)
    np.testing.assert_allclose(total.m2.numpy(), ((rows - mean) ** 2 * weights[:, None]).sum(0).numpy(), rtol=1e-12)


@pytest.mark.parametrize("agg", list(Aggregator))
def test_any_split_of_the_samples_gives_the_definition(agg):
    # A large offset makes sum(x^2) - n mean^2 lose the variance; Chan's formula keeps it.
    rows = torch.randn(23, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1e7
    want = REFERENCE[agg](rows.numpy(), 0)
    for sizes in ([23], [1] * 23, [10, 0, 12, 1], [0, 23]):
        total, *others = (state_of(part) for part in rows.split(sizes))
        for state in others:
            total = total.merged(state)
        assert total.num == 23
        np.testing.assert_allclose(total.result(agg).numpy(), want, rtol=1e-9)


def test_values_are_accumulated_in_float64():
    state = state_of(torch.tensor([[1.0], [2.0**-30]]))
    assert all(x.dtype == torch.float64 for x in state)
    assert state.result(Aggregator.mean).item() == (1 + 2.0**-30) / 2


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="no calibration sample"):
        state_of(torch.empty(0, 3)).result(Aggregator.mean)
    with pytest.raises(ValueError, match=r"\[samples, elements\]"):
        state_of(torch.ones(3))
    assert isinstance(state_of(torch.ones(1, 3)), State)
