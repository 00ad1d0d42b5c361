"""Plots of a search: what candidates cost and lose, how well the loss was predicted, how ranks settle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compactlm_nemo.errors import DataError
from compactlm_nemo.importance.agreement import spearman
from compactlm_nemo.report.plots import draw_curve, log_if_wide, save, short_number

SMOOTHED = 10
"""A rank at a step compares mean losses over the last 1 / `SMOOTHED` of the steps until then."""
COSTS = {"latency_ms": "milliseconds of a forward pass", "params": "parameters"}
"""Key of a cost -> label of its axis; the plot takes the first key that all candidates have."""


def shape_label(candidate: dict[str, Any]) -> str:
    """Write a shape as `23 layers, hidden 576, MLP 1296, heads 9`."""
    return "{layers} layers, hidden {hidden}, MLP {ffn}, heads {heads}".format(**candidate)


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, loss) on the Pareto front, by cost.

    No other point is better than one of these in cost or loss and no worse in the other.
    """
    front, best = [], float("inf")
    for index in sorted(range(len(points)), key=points.__getitem__):
        if points[index][1] < best:
            best = points[index][1]
            front.append(index)
    return front


def plot_pareto(candidates: list[dict[str, Any]], path: Path) -> Figure:
    """Plot loss against cost, with the Pareto front as a line; cost is latency where measured, else parameters.

    Args:
        candidates: Lines of candidates.json or ranking.json with a `loss` or `zero_shot_loss`; others are left out.
        path: PNG to write.
    """
    kind = "loss" if any(c.get("loss") is not None for c in candidates) else "zero_shot_loss"
    measured = [c for c in candidates if c.get(kind) is not None]
    if not measured:
        raise DataError(f"{path.name}: no candidate has a loss; set search.top or rank.candidates.")
    cost = next(name for name in COSTS if all(c.get(name) is not None for c in measured))
    points = [(c[cost], c[kind]) for c in measured]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*zip(*points, strict=True), color="C0")
    front = pareto_front(points)
    axes.plot(*zip(*[points[i] for i in front], strict=True), color="C1", drawstyle="steps-post")
    for number, index in enumerate(front, start=1):
        axes.annotate(str(number), points[index], xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.plot([], [], " ", label=f"{number}: {shape_label(measured[index])}")
    when = "after a short distillation" if kind == "loss" else "right after the cut"
    axes.set(title=f"Candidates: validation loss {when}", xlabel=COSTS[cost], ylabel="LM loss, nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="best at their cost", fontsize=7, title_fontsize=8, handlelength=0)
    return save(figure, path)


def plot_prediction(candidates: list[dict[str, Any]], path: Path) -> Figure:
    """Plot measured zero-shot loss against the predicted loss, a proxy; the title gives Spearman's rank correlation.

    Args:
        candidates: Lines of candidates.json; those without `predicted_loss` or `zero_shot_loss` are left out.
        path: PNG to write.
    """
    points = [
        (c["predicted_loss"], c["zero_shot_loss"])
        for c in candidates
        if c.get("zero_shot_loss") is not None and "predicted_loss" in c
    ]
    if len(points) < 2:
        raise DataError(
            f"{path.name}: fewer than two candidates have a predicted and a zero-shot loss; raise search.top."
        )
    predicted, loss = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(predicted, loss, color="C0")
    axes.set(
        title=f"Predicted and measured, {len(points)} candidates: rank correlation {spearman(predicted, loss):.2f}",
        xlabel="predicted loss (a proxy)",
        ylabel="zero-shot loss, nats per token",
    )
    axes.grid(alpha=0.3)
    return save(figure, path)


def ranks_over_steps(curves: dict[int, list[float]]) -> dict[int, list[int]]:
    """Rank the candidates at every step that all curves have, by the mean of the last losses; rank 1 is best."""
    steps = min(map(len, curves.values()))
    means = np.array(
        [
            [np.mean(losses[step - max(0, step // SMOOTHED) : step + 1]) for step in range(steps)]
            for losses in curves.values()
        ]
    )
    ranks = means.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable") + 1
    return {candidate: row.tolist() for candidate, row in zip(curves, ranks, strict=True)}


def plot_rank_curves(curves: dict[int, list[tuple[float, float]]], labels: dict[int, str], path: Path) -> Figure:
    """Plot each candidate's distillation loss and rank over the tokens trained (as figure 9 of arXiv 2407.14679).

    Args:
        curves: Candidate -> points (tokens trained, distillation loss); a candidate dropped on the way has fewer.
        labels: Candidate -> its name in the legend.
        path: PNG to write.
    """
    if not any(curves.values()):
        raise DataError(f"{path.name}: no candidate has been trained; run recipes.rank.")
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {candidate: f"C{number % 10}" for number, candidate in enumerate(sorted(curves))}
    for candidate, color in colors.items():
        draw_curve(left, curves[candidate], label=f"{candidate}: {labels[candidate]}", color=color)
    log_if_wide(left, [loss for points in curves.values() for _, loss in points])
    longest = max(map(len, curves.values()))
    finished = {candidate: points for candidate, points in curves.items() if len(points) == longest}
    ranks_of = ranks_over_steps({candidate: [loss for _, loss in points] for candidate, points in finished.items()})
    for candidate, ranks in ranks_of.items():
        tokens = [position for position, _ in finished[candidate]]
        right.plot(tokens, ranks, color=colors[candidate], linewidth=1.5)
    left.set(title="Distillation loss", ylabel="weighted sum of the losses, per token")
    left.legend(fontsize=7)
    right.set(title="Rank among those trained to the end", ylabel="rank, 1 is best")
    right.invert_yaxis()
    for axes in (left, right):
        axes.set_xlabel("tokens trained")
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        axes.grid(alpha=0.3)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return save(figure, path)
