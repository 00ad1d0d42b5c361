"""Running aggregates against numpy's own definitions on all data at once."""

import numpy as np
import pytest
import torch

from compactlm_nemo.config.schema import Aggregator
from compactlm_nemo.errors import DataError, NumericsError
from compactlm_nemo.importance.statistics import SampleAggregate, over_sequence

REFERENCE = {
    Aggregator.mean: lambda x, axis: np.abs(x).mean(axis),
    Aggregator.l2: lambda x, axis: np.linalg.norm(x, axis=axis),
    Aggregator.var: lambda x, axis: np.var(x, axis),
}


@pytest.mark.parametrize("agg", list(Aggregator))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_over_sequence_is_the_definition(agg, dtype):
    x = (torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)) * 3 - 1).to(dtype)
    got = over_sequence(x, agg)
    assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    np.testing.assert_allclose(got.double().numpy(), REFERENCE[agg](x.double().numpy(), 1), rtol=tolerance)


def test_over_sequence_of_known_numbers():
    x = torch.tensor([[[3.0], [-4.0]]])
    assert over_sequence(x, Aggregator.mean).item() == 3.5
    assert over_sequence(x, Aggregator.l2).item() == 5.0
    assert over_sequence(x, Aggregator.var).item() == 12.25


@pytest.mark.parametrize("agg", list(Aggregator))
def test_any_split_of_the_samples_gives_the_definition(agg):
    # A large offset makes sum(x^2) - n mean^2 lose the variance; Chan's formula keeps it.
    rows = torch.randn(23, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1e7
    want = REFERENCE[agg](rows.numpy(), 0)
    for sizes in ([23], [1] * 23, [10, 0, 12, 1]):
        ranks = [SampleAggregate(agg) for _ in range(min(2, len(sizes)))]
        for i, part in enumerate(rows.split(sizes)):
            ranks[i % len(ranks)].add(part)
        total = SampleAggregate(agg)
        for rank in ranks:
            total.merge(rank.state())
        np.testing.assert_allclose(total.result().numpy(), want, rtol=1e-9)


@pytest.mark.parametrize("agg", [Aggregator.mean, Aggregator.l2])
def test_states_of_mean_and_l2_add_up(agg):
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    halves = []
    for part in rows.split([4, 5]):
        halves.append(SampleAggregate(agg))
        halves[-1].add(part)
    summed = SampleAggregate(agg)
    summed.merge({name: value + halves[1].state()[name] for name, value in halves[0].state().items()})
    assert all(value.dtype == torch.float64 for value in summed.state().values())
    np.testing.assert_allclose(summed.result().numpy(), REFERENCE[agg](rows.double().numpy(), 0), rtol=1e-12)


def test_inputs_and_states_are_left_alone():
    aggregate = SampleAggregate(Aggregator.l2)
    values = torch.ones(2, 3)
    aggregate.add(values)
    aggregate.state()["sum_sq"].zero_()
    assert aggregate.result().tolist() == [2**0.5] * 3 and values.tolist() == [[1.0] * 3] * 2


def test_bad_input_is_refused():
    aggregate = SampleAggregate(Aggregator.mean)
    with pytest.raises(DataError, match="no calibration sample"):
        aggregate.result()
    with pytest.raises(ValueError, match=r"\[samples, elements\]"):
        aggregate.add(torch.ones(3))
    with pytest.raises(ValueError, match="a mean aggregate needs"):
        aggregate.merge({"count": torch.ones(()), "mean": torch.ones(3), "m2": torch.ones(3)})
    aggregate.add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(NumericsError, match="1 of 2 scores"):
        aggregate.result()
