"""Plots what runs lose against what they cost: parameters, tokens of their training, forward speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from compactlm_nemo.errors import DataError
from compactlm_nemo.report.plots import save, short_number

COSTS = {"params": "parameters", "tokens": "tokens trained", "speed": "forward tokens/s"}
"""Key of a point -> label of its panel's axis; one that no student has gets no panel."""


def plot_tradeoffs(points: list[dict[str, Any]], path: Path) -> Figure:
    """Plot held-out loss over each cost, a colour a text; students are numbered, and the legend has their names.

    A teacher is a hollow square, and a level line over the tokens, of which it has none.

    Args:
        points: `run` (label), `is_teacher`, `text`, `lm_loss_nats`, and what is known of `params`, `tokens`, `speed`.
        path: PNG to write.
    """
    students = [point for point in points if not point["is_teacher"]]
    costs = [cost for cost in COSTS if any(point.get(cost) is not None for point in students)]
    if not costs:
        raise DataError(f"{path.name}: no run has a measured student; run the evaluate stage first.")
    texts = list(dict.fromkeys(point["text"] for point in points))
    numbers = {run: number for number, run in enumerate(dict.fromkeys(point["run"] for point in students), start=1)}
    figure = Figure(figsize=(4 * len(costs) + 2, 5), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs, strict=True):
        for place, text in enumerate(texts, start=1):  # the colours of the loss curve, where C0 is the training text
            _draw([point for point in points if point["text"] == text], axes, cost, numbers, place)
        axes.set_xlabel(COSTS[cost])
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        axes.margins(x=0.2, y=0.1)  # room for the numbers
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("LM loss, nats per token")
    for place, text in enumerate(texts, start=1):
        panels[0].plot([], [], "o", color=f"C{place}", label=text)
    panels[0].plot([], [], "s", color="black", markerfacecolor="white", label="teacher")
    for run, number in numbers.items():
        panels[0].plot([], [], " ", label=f"{number}: {run}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle("Held-out loss against what a model costs")
    return save(figure, path)


def _draw(points: list[dict[str, Any]], axes: Axes, cost: str, numbers: dict[str, int], place: int) -> None:
    """Draw the points of one text; its numbers stand on the side where the next text's do not."""
    color, side = f"C{place}", ("right", "left")[place % 2]
    for point in points:
        loss, x = point["lm_loss_nats"], point.get(cost)
        if x is None:
            if point["is_teacher"]:
                axes.axhline(loss, color=color, linestyle="--", linewidth=1)
            continue
        if point["is_teacher"]:
            axes.plot([x], [loss], "s", color=color, markerfacecolor="white", markeredgewidth=1.6)
            continue
        axes.plot([x], [loss], "o", color=color)
        axes.annotate(
            str(numbers[point["run"]]), (x, loss), xytext=(6 if side == "left" else -6, 4),
            textcoords="offset points", fontsize=8, color=color, ha=side,
        )  # fmt: skip
