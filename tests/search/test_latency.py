"""The latency of a candidate against scipy's interpolation and a made-up device whose times are known everywhere."""

import random
from dataclasses import replace

import numpy
import pytest
from scipy.interpolate import RegularGridInterpolator

from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.search.latency import PARTS, LatencyTable, grid, interpolate, sizes_of
from compactlm_nemo.search.space import Budget, enumerate_space, within
from tests.support.shapes import TINY

TEACHER = replace(TINY, num_layers=6, hidden_size=64, ffn_hidden_size=96, num_heads=12, num_query_groups=4)
SPACE = SearchConfig(
    layers=[2, 6], multiples={"hidden": 8, "ffn": 24, "groups": 1}, heads=[2, 4, 6, 8, 9, 12], smallest=0.25
)
MOE = replace(TEACHER, num_experts=8, experts_per_token=2, shared_expert_ffn=10)
MOE_SPACE = replace(SPACE, experts=[2, 5, 6, 8], shared_expert_ffn=[4, 10])


def test_interpolation_is_that_of_scipy():
    draw = numpy.random.default_rng(0)
    axes = [[2, 3, 9], [5], [1, 4], [0, 10, 11, 30]]
    values = draw.random([len(axis) for axis in axes])
    points = {tuple(axis[i] for axis, i in zip(axes, at, strict=True)): v for at, v in numpy.ndenumerate(values)}
    wide = RegularGridInterpolator([axes[0], axes[2], axes[3]], values[:, 0])
    for _ in range(50):
        at = [draw.integers(axis[0], axis[-1] + 1) for axis in axes]
        assert interpolate(points, tuple(at)) == pytest.approx(float(wide([at[0], *at[2:]])[0]), rel=1e-12)
    assert interpolate(points, (100, 100, 100, 100)) == values[-1, -1, -1, -1]
    assert interpolate(points, (0, 0, 0, 0)) == values[0, 0, 0, 0]


def made_up(dims):
    """Times linear in each size, so that interpolation is exact; of attention, MLP and head."""
    per_group = dims.num_heads / dims.num_query_groups
    attention = 1 + dims.hidden_size * (2 + 3 * dims.num_query_groups * per_group)
    mlp = 5 + dims.hidden_size * (dims.ffn_hidden_size + dims.num_experts) + 7 * dims.shared_expert_ffn
    return {"attention": attention, "mlp": mlp, "head": 11 * dims.hidden_size}


def timed(table, candidates):
    times = {part: dict(table.times[part]) for part in PARTS}
    for dims in table.missing(candidates):
        assert dims.num_heads % dims.num_query_groups == 0
        for part, ms in made_up(dims).items():
            times[part][sizes_of(part, dims)] = ms
    return LatencyTable(table.metadata, times)


@pytest.mark.parametrize(("teacher", "space"), [(TEACHER, SPACE), (MOE, MOE_SPACE)])
def test_the_latency_of_every_candidate(teacher, space, tmp_path):
    candidates = enumerate_space(teacher, space)
    empty = LatencyTable.load(tmp_path / "nothing", {})
    assert len(empty.missing(candidates)) < len(candidates) / 10
    table = timed(empty, candidates)
    assert table.missing(candidates) == []
    for dims in random.Random(0).sample(candidates, 200):
        part = made_up(dims)
        want = dims.num_layers * (part["attention"] + part["mlp"]) + part["head"]
        assert table.only(candidates).milliseconds(dims) == pytest.approx(want, rel=1e-12)


def test_three_values_of_an_axis_are_timed():
    candidates = [replace(TINY, hidden_size=h, ffn_hidden_size=f) for h in (3, 5, 6, 8, 9) for f in (4, 2)]
    assert grid("head", candidates) == [(3,), (6,), (9,)]
    assert grid("mlp", candidates) == [(h, f, 0, 0) for h in (3, 6, 9) for f in (2, 4)]


def test_a_file_is_read_back_and_only_what_is_new_is_timed(tmp_path):
    candidates = enumerate_space(MOE, MOE_SPACE)
    metadata = {"device": "made up", "batch": 1}
    table = timed(LatencyTable.load(tmp_path / "t.json", metadata), candidates)
    table.save(tmp_path / "t.json")
    again = LatencyTable.load(tmp_path / "t.json", metadata)
    assert again == table and again.missing(candidates) == []
    assert LatencyTable.load(tmp_path / "t.json", metadata | {"batch": 2}).missing(candidates) != []
    # Widths of 10 are new for every hidden size; attention and head were timed.
    more = [replace(dims, ffn_hidden_size=10) for dims in candidates]
    assert {dims.ffn_hidden_size for dims in again.missing(more)} == {10}
    # Points of another space do not get in between.
    assert timed(again, more).only(candidates) == table


def test_a_latency_budget_is_a_limit():
    candidates = enumerate_space(TEACHER, SPACE)
    table = timed(LatencyTable({}, {part: {} for part in PARTS}), candidates)
    middle = sorted(map(table.milliseconds, candidates))[len(candidates) // 2]
    kept = within(candidates, [Budget("latency_ms", middle, table.milliseconds)])
    assert kept == [dims for dims in candidates if table.milliseconds(dims) <= middle]
    best = f"{min(map(table.milliseconds, candidates)):.10g}"
    with pytest.raises(ConfigError, match=f"search.latency_ms=1 is met by none.*nearest has {best} latency_ms"):
        within(candidates, [Budget("latency_ms", 1.0, table.milliseconds)])
