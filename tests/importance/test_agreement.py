"""Rank correlations against their definitions over all pairs, written in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from compactlm_nemo.errors import DataError, NumericsError
from compactlm_nemo.importance import names as unit_names
from compactlm_nemo.importance.agreement import agreement, kendall_tau, per_vector, settled, spearman


def naive_tau(a: list[float], b: list[float]) -> float:
    """(concordant - discordant) / sqrt(pairs not tied in a * pairs not tied in b)."""
    signs = [
        ((x > y) - (x < y), (u > v) - (u < v))
        for (x, u), (y, v) in itertools.combinations(list(zip(a, b, strict=True)), 2)
    ]
    return sum(s * t for s, t in signs) / math.sqrt(sum(s != 0 for s, _ in signs) * sum(t != 0 for _, t in signs))


def naive_rho(a: list[float], b: list[float]) -> float:
    """Pearson's r of ranks; the rank of x is the number below it plus half of the others that equal it."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(y < x for y in values) + (sum(y == x for y in values) - 1) / 2 for x in values]

    x, y = ranks(a), ranks(b)
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((u - mean_x) * (v - mean_y) for u, v in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((u - mean_x) ** 2 for u in x) * sum((v - mean_y) ** 2 for v in y))


def _pair(length: int, levels: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Two vectors that agree in part; with few levels most pairs are tied."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(length, generator=generator, dtype=torch.float64)
    b = a + torch.randn(length, generator=generator, dtype=torch.float64)
    return (a, b) if levels is None else ((a * levels).round(), (b * levels).round())


@pytest.mark.parametrize("length", [2, 3, 17, 60, 131])
@pytest.mark.parametrize("levels", [None, 1, 3])
def test_correlations_are_their_definitions(length: int, levels: int | None) -> None:
    checked = 0
    for seed in range(8):
        a, b = _pair(length, levels, seed)
        if len(set(a.tolist())) > 1 and len(set(b.tolist())) > 1:
            checked += 1
            assert kendall_tau(a, b) == pytest.approx(naive_tau(a.tolist(), b.tolist()), abs=1e-12)
            assert spearman(a, b) == pytest.approx(naive_rho(a.tolist(), b.tolist()), abs=1e-12)
    assert checked >= 2


def test_known_numbers() -> None:
    a = torch.tensor([1.0, 2.0, 2.0, 3.0])
    b = torch.tensor([1.0, 3.0, 2.0, 2.0])
    # Pairs: (1,2) (1,3) (1,4) agree, (2,4) disagrees, (2,3) is tied in a, (3,4) in b.
    assert kendall_tau(a, b) == pytest.approx((3 - 1) / math.sqrt(5 * 5))
    # Ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5 around their mean of 2.5.
    assert spearman(a, b) == pytest.approx((2.25 + 0 + 0 + 0) / 4.5)


@pytest.mark.parametrize("measure", [kendall_tau, spearman])
def test_orders_without_a_correlation_have_a_rule(measure) -> None:
    same, other, rising = torch.full((5,), 2.0), torch.full((5,), -7.0), torch.arange(5.0)
    assert measure(same, other) == 1.0
    assert measure(torch.tensor([3.0]), torch.tensor([8.0])) == 1.0
    assert measure(torch.empty(0), torch.empty(0)) == 1.0
    assert measure(same, rising) == measure(rising, same) == 0.0
    infinite = torch.tensor([-math.inf, 0.0, 1.0, 2.0, math.inf])
    assert measure(infinite, rising) == 1.0
    assert measure(infinite, -rising) == pytest.approx(-1)
    for bad in (torch.tensor([0.0, math.nan, 1, 2, 3]), torch.full((5,), math.nan)):
        with pytest.raises(NumericsError, match="NaN"):
            measure(rising, bad)
    for a, b in ((rising, torch.arange(4.0)), (rising[:1], rising), (rising.view(1, 5), rising.view(1, 5))):
        with pytest.raises(DataError, match="vectors of one length"):
            measure(a, b)


def test_only_the_order_counts_and_the_same_order_is_exactly_one() -> None:
    for length in range(2, 200):
        a, b = _pair(length, 3, length)
        assert kendall_tau(a, a.exp()) == spearman(a, a.exp()) == 1.0
        assert kendall_tau(a.exp(), b / 4) == kendall_tau(a, b)
        assert kendall_tau(b, a) == pytest.approx(kendall_tau(a, b), abs=1e-12)


def _scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = {unit_names.HIDDEN: 16, unit_names.DEPTH: 3}
    for layer in range(3):
        names |= {unit_names.heads_key(layer): 8, unit_names.groups_key(layer): 4, unit_names.mlp_key(layer): 12}
        names |= {unit_names.experts_key(layer): 2, unit_names.shared_expert_key(layer): 6}
        names |= {unit_names.expert_mlp_key(layer, expert): 10 for expert in range(2)}
    return {name: torch.rand(length, generator=generator) for name, length in names.items()}


def test_agreement_is_the_mean_over_the_vectors_of_an_axis() -> None:
    first, second = _scores(), {name: x.flip(0) + 0.01 for name, x in _scores().items()}
    kept = {name: x.clone() for name, x in first.items()}
    found = agreement(first, second)
    assert list(found) == ["hidden", "heads", "groups", "mlp", "experts", "expert_mlp", "shared_expert", "depth"]
    taus = {name: naive_tau(x.tolist(), second[name].tolist()) for name, x in first.items()}
    assert found["hidden"] == pytest.approx(taus["hidden"])
    assert found["depth"] == pytest.approx(taus["depth"])
    assert found["mlp"] == pytest.approx(sum(taus[f"layers.{i}.mlp"] for i in range(3)) / 3)
    assert found["experts"] == pytest.approx(sum(taus[f"layers.{i}.experts"] for i in range(3)) / 3)
    expert_mlp = [taus[f"layers.{i}.experts.{e}.mlp"] for i in range(3) for e in range(2)]
    assert found["expert_mlp"] == pytest.approx(sum(expert_mlp) / 6)
    assert per_vector(first, second)["expert_mlp"] == pytest.approx(expert_mlp)
    rho = agreement(first, second, spearman)
    assert rho["hidden"] == pytest.approx(naive_rho(first["hidden"].tolist(), second["hidden"].tolist()))
    assert all(torch.equal(x, kept[name]) for name, x in first.items())


def test_settled_is_the_axis_that_moved_most() -> None:
    first = _scores()
    assert settled(first, {name: 3 * x + 1 for name, x in first.items()}) == 0.0
    moved = first | {"layers.1.heads": -first["layers.1.heads"]}
    assert settled(first, moved) == pytest.approx(2 / 3)  # tau of -1 in one of three layers
    assert settled(first, moved | {"hidden": -first["hidden"]}) == pytest.approx(2.0)
    with pytest.raises(DataError, match="no scores"):
        settled({}, {})


def test_vectors_that_do_not_match_are_named() -> None:
    first = _scores()
    for change, words in (
        ({"layers.2.mlp": torch.rand(11)}, ("axis mlp", "layers.2.mlp", "12", "11")),
        ({"layers.2.experts.1.mlp": torch.rand(9)}, ("axis expert_mlp", "10", "9")),
        ({"layers.3.groups": torch.rand(4)}, ("axis groups", "layers.3.groups", "4 values", "second")),
    ):
        for call in (agreement, settled):
            with pytest.raises(DataError) as caught:
                call(first, first | change)
            assert "\n" not in str(caught.value)
            for word in words:
                assert word in str(caught.value)
    with pytest.raises(DataError, match=r"axis hidden: hidden \(16 values\) is in the first scores, not in the second"):
        agreement(first, {name: x for name, x in first.items() if name != "hidden"})
    with pytest.raises(DataError, match="without its prefix"):
        unit_names.axis_of("l2_mean.hidden")
