"""Plots of a run as PNG files. `Figure` is used directly: no pyplot, so no display and no global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compactlm_nemo.errors import DataError
from compactlm_nemo.training.tracker import LM_LOSS, LOSS, TEACHER_LM_LOSS


def save(figure: Figure, path: Path) -> Figure:
    """Write a figure as PNG, and hand it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    return figure


def plot_loss_curve(metrics: list[dict[str, Any]], path: Path) -> Figure:
    """Distillation loss, and the LM loss of student and teacher, against the step; in nats per token.

    Args:
        metrics: Lines with `step` and any of the three `train/` keys above; other lines and keys are skipped.
        path: PNG to write.
    """
    series = {
        key: [(row["step"], row[key]) for row in metrics if key in row and "step" in row]
        for key in (LOSS, LM_LOSS, TEACHER_LM_LOSS)
    }
    if not any(series.values()):
        raise DataError(f"{path.name}: no metric line has step and one of {', '.join(series)}; distil first.")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, series[LOSS], "weighted sum of the losses", "C0")
    _curve(right, series[LM_LOSS], "student", "C0")
    _curve(right, series[TEACHER_LM_LOSS], "teacher", "C1")
    left.set(title="Distillation loss", xlabel="step", ylabel="per token")
    right.set(title="Training LM loss", xlabel="step", ylabel="nats per token")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend()
    if left.lines and min(value for _, value in series[LOSS]) > 0:
        left.set_yscale("log")
    return save(figure, path)


def _curve(axes: Axes, points: list[tuple[float, float]], label: str, color: str) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=label, color=color, linewidth=1.2, marker="." if len(points) < 30 else None)


def plot_sizes(rows: list[dict[str, Any]], path: Path) -> Figure:
    """Held-out loss against size, one labelled point a row.

    Args:
        rows: `model` (label), `params` (count), `lm_loss_nats` (held-out, per token), and `text` (name of the
            held-out set, one colour each) when there are several.
        path: PNG to write.
    """
    if not rows:
        raise DataError(f"{path.name}: there is no result to plot; run the evaluate stage first.")
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    texts = list(dict.fromkeys(row.get("text", "held-out") for row in rows))
    for text in texts:
        points = [row for row in rows if row.get("text", "held-out") == text]
        axes.scatter([row["params"] / 1e6 for row in points], [row["lm_loss_nats"] for row in points], label=text)
        for row in points:
            place = (row["params"] / 1e6, row["lm_loss_nats"])
            axes.annotate(row["model"], place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(title="Size and held-out loss", xlabel="parameters, millions", ylabel="LM loss, nats per token")
    axes.margins(x=0.2, y=0.1)  # room for the labels
    axes.grid(alpha=0.3)
    if len(texts) > 1:
        axes.legend()
    return save(figure, path)
