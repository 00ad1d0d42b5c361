"""Intervals hold what they promise on simulated documents, and the paired test agrees with enumeration and scipy."""

from __future__ import annotations

from itertools import product

import numpy
import pytest
import scipy.stats
import torch
from torch import Tensor

from compactlm_nemo.evaluation.bootstrap import difference, interval, mean_of_ratio
from compactlm_nemo.evaluation.metric import Metric, summarise


def _documents(generator: numpy.random.Generator, num: int, rise: float = 0.0, is_skewed: bool = False) -> Tensor:
    """Draw documents of uneven length, each with a difficulty of its own; the true mean loss is 3 + `rise`."""
    tokens = generator.integers(20, 200, num)
    difficulty = generator.gamma(2, 0.3, num) - 0.6 if is_skewed else generator.normal(0, 0.4, num)
    losses = 3 + rise + difficulty + generator.normal(0, 1, num) / numpy.sqrt(tokens)
    return torch.tensor(numpy.stack([losses * tokens, tokens], axis=1))


@pytest.mark.parametrize(("num", "is_skewed"), [(25, False), (60, False), (200, True)])
def test_intervals_hold_the_truth_in_95_of_100_cases(num: int, is_skewed: bool) -> None:
    trials = 1500
    generator = numpy.random.default_rng(3)
    held = 0
    for trial in range(trials):
        found = interval(_documents(generator, num, is_skewed=is_skewed), mean_of_ratio, resamples=500, seed=trial)
        held += found.low <= 3.0 <= found.high
    assert 0.93 <= held / trials <= 0.97


def test_differences_of_a_shared_difficulty_are_held_too_and_are_narrower_than_unpaired() -> None:
    generator = numpy.random.default_rng(5)
    trials, held, paired, unpaired = 600, 0, 0.0, 0.0
    for trial in range(trials):
        teacher = _documents(generator, 40)
        student = teacher.clone()
        student[:, 0] += teacher[:, 1] * torch.tensor(generator.normal(0.2, 0.1, 40))
        found = difference(student, teacher, mean_of_ratio, resamples=300, seed=trial)
        held += found.low <= 0.2 <= found.high
        alone = interval(student, mean_of_ratio, resamples=300, seed=trial)
        paired, unpaired = paired + found.high - found.low, unpaired + alone.high - alone.low
    assert 0.93 <= held / trials <= 0.97
    assert paired < unpaired / 2


def test_the_interval_of_a_mean_is_student_s() -> None:
    values = numpy.random.default_rng(0).normal(1.0, 2.0, 12)
    parts = torch.tensor(numpy.stack([values, numpy.ones(12)], axis=1))
    found = interval(parts, mean_of_ratio, resamples=40_000, seed=0)
    low, high = scipy.stats.t.interval(0.95, 11, loc=values.mean(), scale=values.std(ddof=1) / 12**0.5)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(low, abs=0.06 * (high - low))
    assert found.high == pytest.approx(high, abs=0.06 * (high - low))


def test_p_is_the_share_of_exchanges_that_part_the_models_as_far() -> None:
    generator = numpy.random.default_rng(2)
    ours, teacher = _documents(generator, 8, rise=0.4), _documents(generator, 8)
    teacher[:, 1] = ours[:, 1]
    found = difference(ours, teacher, mean_of_ratio, resamples=20_000, seed=1)
    measured = abs(float(ours[:, 0].sum() - teacher[:, 0].sum()))
    as_far = 0
    for signs in product((1, -1), repeat=8):
        gaps = (ours[:, 0] - teacher[:, 0]).numpy()
        as_far += abs(float(numpy.dot(signs, gaps))) >= measured * (1 - 1e-12)
    assert found.p == pytest.approx(as_far / 2**8, abs=0.015)


def test_a_model_against_itself_differs_by_nothing() -> None:
    parts = _documents(numpy.random.default_rng(1), 30)
    assert difference(parts, parts, mean_of_ratio, resamples=200, seed=0) == (0.0, 0.0, 0.0, 1.0)


def test_one_unit_has_no_interval_and_a_missing_value_is_left_out() -> None:
    one, empty = torch.tensor([[2.0, 4.0]], dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    (summary,) = summarise([Metric(name="loss/x", parts={"teacher": one})], resamples=50, seed=0)
    assert summary["models"] == {"teacher": {"value": 0.5, "low": None, "high": None}}
    (summary,) = summarise([Metric(name="loss/x", parts={"teacher": empty, "pruned": empty})], resamples=50, seed=0)
    assert summary["models"] == summary["against_teacher"] == {}
