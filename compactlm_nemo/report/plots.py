"""Plots a run as PNG files. `Figure` is used directly: no pyplot, so no display and no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from compactlm_nemo.errors import DataError
from compactlm_nemo.training.tracker import CORRECTION_LOSS, LM_LOSS, LOSS, TEACHER_LM_LOSS

TOKENS = "train/tokens"
"""This metric counts the tokens of a step."""
SMOOTHED_FROM = 40
"""A curve of at least this many points is drawn pale, below its running mean over a twentieth of the points."""


def save(figure: Figure, path: Path) -> Figure:
    """Write a figure as PNG, and return the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    return figure


def short_number(value: float, _position: int | None = None) -> str:
    """Write a number as a tick shows it: 500, 20k, 1.5M, 94B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def log_if_wide(axes: Axes, values: Sequence[float] | np.ndarray) -> None:
    """Give the y axis a logarithmic scale where positive values span a decade, with ticks at 1, 2 and 5 in figures."""
    numbers = np.asarray(values, dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    if numbers.size == 0 or numbers.min() <= 0 or numbers.max() < 10 * numbers.min():
        return
    is_short = numbers.max() < 1e3 * numbers.min()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_short else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def tokens_curve(metrics: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return a metric as points (tokens trained, value).

    A step without a line (`distill.log_every`) counts with the tokens of the next line. The value of a
    `train/` key belongs to the weights before the step's update, the value of another key to those after the update.

    Args:
        metrics: Lines of metrics.jsonl; a line without `step` or `train/tokens`, or with a null value, gives no point.
    """
    points, tokens, last_step = [], 0.0, -1
    for row in metrics:
        if "step" not in row or row.get(TOKENS) is None:
            continue
        tokens += row[TOKENS] * (row["step"] - last_step)
        last_step = row["step"]
        if row.get(key) is not None:
            points.append((tokens - (row[TOKENS] if key.startswith("train/") else 0.0), row[key]))
    return points


def plot_loss_curve(
    metrics: list[dict[str, Any]], path: Path, heldout: dict[str, dict[str, float]] | None = None
) -> Figure:
    """Plot LM losses (student and teacher in training, and held-out ones) and the distillation loss over tokens.

    The teacher is a level line at its mean, or a curve where it is corrected while it teaches.

    Args:
        metrics: Lines of metrics.jsonl with `step`, `train/tokens` and any of the three `train/` losses.
        path: PNG to write.
        heldout: Text -> LM loss of `teacher`, `pruned` and `distilled` in nats per token.
    """
    curves = {key: tokens_curve(metrics, key) for key in (LOSS, LM_LOSS, TEACHER_LM_LOSS)}
    if not any(curves.values()):
        raise DataError(f"{path.name}: no metric line has step, {TOKENS} and one of {', '.join(curves)}; distil first.")
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curve(left, curves[LM_LOSS], label="student, training text", color="C0")
    if curves[TEACHER_LM_LOSS]:
        _draw_teacher(left, curves[TEACHER_LM_LOSS], is_level=not tokens_curve(metrics, CORRECTION_LOSS))
    last = tokens_curve([row | {"end": 0.0} for row in metrics], "end")[-1][0]
    for number, (text, losses) in enumerate((heldout or {}).items(), start=1):
        evaluated = tokens_curve(metrics, f"eval/{text}_lm_loss_nats")
        _draw_heldout(left, losses, evaluated, last, label=f"{text}, held out", color=f"C{number}")
    draw_curve(right, curves[LOSS], label="", color="C0")
    log_if_wide(right, [loss for _, loss in curves[LOSS]])
    left.set(title="LM loss")
    right.set(title="Distillation loss")
    for axes, unit in ((left, "nats per token"), (right, "weighted sum of the losses, per token")):
        axes.set(xlabel="tokens trained", ylabel=unit)
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        axes.grid(alpha=0.3)
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8)
    return save(figure, path)


def draw_curve(axes: Axes, points: list[tuple[float, float]], *, label: str, color: str, style: str = "-") -> None:
    """Draw points as a line; a long line is pale below its running mean, and the mean carries the label."""
    if not points:
        return
    x, y = (np.array(values) for values in zip(*points, strict=True))
    if len(points) >= SMOOTHED_FROM:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
        y = _running_mean(y, len(y) // 20)
    marker = "." if len(points) < SMOOTHED_FROM else None
    axes.plot(x, y, label=label or None, color=color, linewidth=1.6, linestyle=style, marker=marker)


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Take the mean of each value and `half` neighbours a side; near the start of as many a side as there are before.

    So the mean begins at the first value, where a curve is steep, and does not end at the last one, which is noise.
    """
    sums, indices = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    reach = np.minimum(half, indices)
    first, last = indices - reach, np.minimum(indices + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _draw_teacher(axes: Axes, points: list[tuple[float, float]], *, is_level: bool) -> None:
    if is_level:
        mean = fmean(loss for _, loss in points)
        axes.axhline(
            mean, color="black", linestyle="--", linewidth=1.2, label=f"teacher, training text: mean {mean:.2f}"
        )
    else:
        draw_curve(axes, points, label="teacher, training text, corrected meanwhile", color="black", style="--")


def _draw_heldout(
    axes: Axes, losses: dict[str, float], evaluated: list[tuple[float, float]], last: float, *, label: str, color: str
) -> None:
    """Draw a text's held-out losses: a hollow mark at the start, a full one at the end, a dash for the teacher."""
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), color=color, linewidth=1.2)
    marks = {"pruned": (0.0, "o", "white"), "distilled": (last, "o", color), "teacher": (last, "_", color)}
    signs = {"pruned": "○", "distilled": "●", "teacher": "–"}
    known = [model for model in marks if model in losses]
    for model in known:
        tokens, marker, fill = marks[model]
        axes.plot(
            [tokens], [losses[model]], marker=marker, markersize=8, markeredgewidth=1.6, color=color,
            markerfacecolor=fill, linestyle="none", zorder=3,
        )  # fmt: skip
    figures = ", ".join(f"{model} {signs[model]} {losses[model]:.2f}" for model in known)
    axes.plot([], [], color=color, marker="o", markersize=6, linewidth=1.2, label=f"{label}: {figures}")


def plot_sizes(rows: list[dict[str, Any]], path: Path) -> Figure:
    """Plot held-out loss against size, one labelled point a row and one colour a text.

    Args:
        rows: `model` (label), `params` (count), `lm_loss_nats` (held-out, per token), and `text` (name of the
            held-out set) when there are several.
        path: PNG to write.
    """
    if not rows:
        raise DataError(f"{path.name}: there is no result to plot; run the evaluate stage first.")
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    texts = list(dict.fromkeys(row.get("text", "held-out") for row in rows))
    for number, text in enumerate(texts, start=1):  # the colours of the loss curve, where C0 is the training text
        points = [row for row in rows if row.get("text", "held-out") == text]
        color, side = f"C{number}", ("right", "left")[number % 2]
        x, y = [row["params"] for row in points], [row["lm_loss_nats"] for row in points]
        axes.scatter(x, y, color=color, label=text)
        for row, position in zip(points, zip(x, y, strict=True), strict=True):
            offset = (6 if side == "left" else -6, 4)
            axes.annotate(
                f"{row['model']} {row['lm_loss_nats']:.2f}", position, xytext=offset, textcoords="offset points",
                fontsize=8, color=color, ha=side,
            )  # fmt: skip
    axes.set(title="Size and held-out loss", xlabel="parameters", ylabel="LM loss, nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.margins(x=0.2, y=0.1)  # room for the labels
    axes.grid(alpha=0.3)
    if len(texts) > 1:
        axes.legend()
    return save(figure, path)
