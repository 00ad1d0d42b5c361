"""Plots how a student behaves beside its teacher: confidence against accuracy, bias, KL by token and by place."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compactlm_nemo.errors import DataError
from compactlm_nemo.report.figures import DISTILLED, PRUNED, TEACHER
from compactlm_nemo.report.plots import log_if_wide, save, short_number

COLORS = {TEACHER: "black", PRUNED: "C1", DISTILLED: "C0"}
BIAS_KINDS = ("ambiguous", "disambiguated")
_GAP = 0.16
"""Distance between the marks of two models in a line of the plot of bias."""


def plot_reliability(bins: dict[str, list[dict[str, float]]], name: str, path: Path) -> Figure:
    """Plot accuracy over confidence with the questions of each bin below, a column for teacher and distilled student.

    On the dashed line a model is as often right as it is sure. A bar stands at its bin, a mark at its mean confidence.

    Args:
        bins: Model -> bins with a question: `low`, `high`, `questions`, `confidence`, `accuracy`.
        name: Of the questions.
        path: PNG to write.
    """
    models = [model for model in (TEACHER, DISTILLED) if bins.get(model)]
    if not models:
        raise DataError(f"{path.name}: no model has answered {name}; run the evaluate stage first.")
    figure = Figure(figsize=(4.5 * len(models), 5), layout="constrained")
    rows = figure.subplots(2, len(models), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    for column, model in enumerate(models):
        upper, lower = rows[:, column]
        found, color = bins[model], COLORS[model]
        middles = [(each["low"] + each["high"]) / 2 for each in found]
        widths = [each["high"] - each["low"] for each in found]
        upper.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color="gray")
        upper.bar(middles, [each["accuracy"] for each in found], widths, color=color, alpha=0.35, edgecolor=color)
        upper.plot(
            [each["confidence"] for each in found], [each["accuracy"] for each in found], "o", color=color, markersize=4
        )
        lower.bar(middles, [each["questions"] for each in found], widths, color=color, alpha=0.35, edgecolor=color)
        upper.set(title=f"{model} on {name}", xlim=(0, 1), ylim=(0, 1))
        lower.set(xlabel="confidence")
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
    rows[0, 0].set_ylabel("accuracy")
    rows[1, 0].set_ylabel("questions")
    return save(figure, path)


def plot_bias(metrics: list[dict[str, Any]], path: Path) -> Figure:
    """Plot the bias scores of each set of questions, ambiguous and disambiguated, from teacher to distilled student.

    Args:
        metrics: Those of `quality.json` of the two kinds; a model without a score has no mark.
        path: PNG to write.
    """
    names = list(dict.fromkeys(metric["metric"].partition("/")[2] for metric in metrics))
    if not names:
        raise DataError(f"{path.name}: no bias was measured; set evaluate.bias.")
    by_name = {metric["metric"]: metric["models"] for metric in metrics}
    figure = Figure(figsize=(9, 1.8 + 0.6 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(BIAS_KINDS), sharey=True)
    for axes, kind in zip(panels, BIAS_KINDS, strict=True):
        for place, name in enumerate(names):
            _draw_bias(axes, by_name.get(f"bias_{kind}/{name}", {}), place)
        axes.axvline(0, color="gray", linewidth=1, linestyle="--")
        axes.set(title=f"{kind} contexts", xlabel="bias: 1 is the stereotype", ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
        axes.grid(alpha=0.3, axis="x")
    for model in (TEACHER, DISTILLED):
        panels[0].plot([], [], "o", color=COLORS[model], label=model)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return save(figure, path)


def _draw_bias(axes: Axes, models: dict[str, dict[str, Any]], place: int) -> None:
    """Draw teacher and student of one set, each with its interval, and an arrow from one to the other."""
    ends = []
    for model, side in ((TEACHER, -_GAP), (DISTILLED, _GAP)):
        if (found := models.get(model)) is None:
            continue
        value, low, high = (found[key] for key in ("value", "low", "high"))
        if low is not None and high is not None:
            axes.plot([low, high], [place + side] * 2, color=COLORS[model], linewidth=1.4)
        axes.plot([value], [place + side], "o", color=COLORS[model])
        ends.append((value, place + side))
    if len(ends) == 2:
        axes.annotate(
            "", ends[1], ends[0], arrowprops={"arrowstyle": "->", "color": "gray", "shrinkA": 4, "shrinkB": 4}
        )


def plot_kl(details: dict[str, dict[str, Any]], path: Path) -> Figure:
    """Plot the KL from the teacher by the frequency of the true token, and by its place in the window.

    A text has a colour, as in the other plots; the pruned model's line is dashed, the distilled one's whole.

    Args:
        details: Text -> `by_frequency` and `by_position` of `quality.json`.
        path: PNG to write.
    """
    if not details:
        raise DataError(f"{path.name}: no held-out text was measured; run the evaluate stage first.")
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    everything: list[float] = []
    for number, (text, found) in enumerate(details.items(), start=1):
        for axes, bins, x in (
            (
                left,
                found["by_frequency"],
                [(each["from_rank"] * each["to_rank"]) ** 0.5 for each in found["by_frequency"]],
            ),
            (right, found["by_position"], [(each["from"] + each["to"]) / 2 for each in found["by_position"]]),
        ):
            for model, style in ((PRUNED, "--"), (DISTILLED, "-")):
                y: list[float] = [each["kl"].get(model, nan) for each in bins]
                everything += y
                label = f"{text}, {model}" if axes is left else None
                axes.plot(x, y, style, color=f"C{number}", marker=".", label=label)
    left.set(
        xscale="log", xlabel="rank of the true token in the training text", ylabel="KL from the teacher, nats a token"
    )
    left.xaxis.set_major_formatter(short_number)
    right.set(xlabel="place in the window")
    log_if_wide(left, everything)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    return save(figure, path)
