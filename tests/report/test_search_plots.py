"""Plots of a search, read back as the numbers their panels hold."""

from __future__ import annotations

import pytest

from compactlm_nemo.errors import DataError
from compactlm_nemo.report.search_plots import (
    pareto_front,
    plot_pareto,
    plot_prediction,
    plot_rank_curves,
    ranks_over_steps,
)

SHAPE = {"layers": 2, "hidden": 8, "ffn": 16, "heads": 2}


def test_the_front_by_hand():
    # Cost 2 is beaten by cost 1 at an equal loss; of equal costs the better one is on it.
    assert pareto_front([(2, 5.0), (1, 5.0), (3, 4.0), (3, 4.5), (4, 4.2), (5, 1.0)]) == [1, 2, 5]


def test_pareto_shows_the_trained_before_the_untrained(tmp_path):
    rows = [
        SHAPE | {"params": 2e6, "zero_shot_loss": 5.0, "loss": 3.0},
        SHAPE | {"params": 1e6, "zero_shot_loss": 4.0, "loss": 3.5},
        SHAPE | {"params": 3e6, "zero_shot_loss": 3.0},
    ]
    figure = plot_pareto(rows, tmp_path / "a.png")
    axes = figure.axes[0]
    # The front has two points, whose numbers the legend explains.
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [entry[:10] for entry in entries] == ["1: 2 layer", "2: 2 layer"]
    assert axes.get_xlabel() == "parameters" and "1.2M" in [text.get_text() for text in axes.get_xticklabels()]
    assert sorted(axes.collections[0].get_offsets().tolist()) == [[1e6, 3.5], [2e6, 3.0]]
    assert "after a short distillation" in axes.get_title() and (tmp_path / "a.png").stat().st_size > 0
    timed = [row | {"latency_ms": 10.0 * i} for i, row in enumerate([rows[0], rows[1]], 1)]
    axes = plot_pareto(timed, tmp_path / "b.png").axes[0]
    assert axes.get_xlabel().startswith("milliseconds")
    assert axes.lines[0].get_xydata().tolist() == [[10.0, 3.0]]
    untrained = [{k: v for k, v in row.items() if k != "loss"} for row in rows]
    assert "right after the cut" in plot_pareto(untrained, tmp_path / "c.png").axes[0].get_title()
    with pytest.raises(DataError, match="no candidate has a loss"):
        plot_pareto([SHAPE | {"params": 1.0}], tmp_path / "d.png")


def test_prediction_names_the_rank_correlation(tmp_path):
    rows = [{"predicted_loss": d, "zero_shot_loss": z} for d, z in ((1, 3.0), (2, 3.5), (3, 3.2), (4, 4.0))]
    axes = plot_prediction([*rows, {"predicted_loss": 9}], tmp_path / "a.png").axes[0]
    assert "4 candidates: rank correlation 0.80" in axes.get_title()  # one swap of neighbours: 1 - 6 * 2 / (4 * 15)
    with pytest.raises(DataError, match="fewer than two"):
        plot_prediction(rows[:1], tmp_path / "b.png")


def test_ranks_settle(tmp_path):
    curves = {3: [1.0, 5.0, 1.0], 0: [2.0, 4.0, 2.0], 7: [3.0]}
    assert ranks_over_steps({3: curves[3], 0: curves[0]}) == {3: [1, 2, 1], 0: [2, 1, 2]}
    points = {key: [(i * 10_000.0, loss) for i, loss in enumerate(losses)] for key, losses in curves.items()}
    figure = plot_rank_curves(points, {3: "c", 0: "a", 7: "h"}, tmp_path / "a.png")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["0: a", "3: c", "7: h"]
    assert [line.get_ydata().tolist() for line in right.lines] == [[1, 2, 1], [2, 1, 2]]
    assert [line.get_color() for line in right.lines] == [left.lines[1].get_color(), left.lines[0].get_color()]
    assert [line.get_xdata().tolist() for line in right.lines] == [[0, 10_000, 20_000]] * 2
    for axes in (left, right):
        assert axes.get_xlabel() == "tokens trained"
        assert {"10k", "20k"} <= {text.get_text() for text in axes.get_xticklabels()}
    with pytest.raises(DataError, match="no candidate has been trained"):
        plot_rank_curves({3: []}, {3: "c"}, tmp_path / "b.png")
    # Twenty steps on, the mean of the last two losses counts.
    late = {1: [1.0] * 20 + [3.0], 2: [2.1] * 21}
    assert ranks_over_steps(late)[1][-1] == 1
