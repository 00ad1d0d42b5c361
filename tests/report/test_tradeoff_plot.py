"""The plot of losses against costs, read back as the points that its panels hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from compactlm_nemo.errors import DataError
from compactlm_nemo.report.tradeoff_plot import plot_tradeoffs


def point(run: str, loss: float, text: str = "wiki", **costs: float | None) -> dict[str, Any]:
    return {"run": run, "is_teacher": run == "teacher", "text": text, "lm_loss_nats": loss, **costs}


POINTS = [
    point("a", 3.0, params=100.0, tokens=1e6, speed=None), point("a", 4.0, "news", params=100.0, tokens=1e6),
    point("b", 3.5, params=80.0, tokens=2e6, speed=7.0), point("teacher", 2.5, params=200.0, tokens=None, speed=5.0),
]  # fmt: skip


def drawn(axes: Axes) -> list[tuple[float, float, str]]:
    """The marks of a panel: x, y and form."""
    return sorted(
        (float(np.ravel(line.get_xdata())[0]), float(np.ravel(line.get_ydata())[0]), str(line.get_marker()))
        for line in axes.lines
        if len(np.ravel(line.get_xdata())) == 1
    )


def test_every_cost_has_a_panel_with_what_is_known(tmp_path: Path) -> None:
    figure = plot_tradeoffs(POINTS, tmp_path / "x.png")
    size, tokens, speed = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["parameters", "tokens trained", "forward tokens/s"]
    assert drawn(size) == [(80, 3.5, "o"), (100, 3, "o"), (100, 4, "o"), (200, 2.5, "s")]
    assert drawn(tokens) == [(1e6, 3, "o"), (1e6, 4, "o"), (2e6, 3.5, "o")]
    assert drawn(speed) == [(5, 2.5, "s"), (7, 3.5, "o")]
    (level,) = (line for line in tokens.lines if line.get_linestyle() == "--")
    assert list(level.get_ydata()) == [2.5, 2.5], "a teacher has no tokens, and is a level"
    assert [text.get_text() for text in size.texts] == ["1", "2", "1"]
    assert [text.get_ha() for text in size.texts] == ["left", "left", "right"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["wiki", "news", "teacher", "1: a", "2: b"]
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_a_cost_that_no_student_has_gets_no_panel(tmp_path: Path) -> None:
    figure = plot_tradeoffs([point("a", 3.0, params=1.0), POINTS[-1]], tmp_path / "x.png")
    assert [axes.get_xlabel() for axes in figure.axes] == ["parameters"]
    with pytest.raises(DataError, match="no run has a measured student"):
        plot_tradeoffs([POINTS[-1]], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
