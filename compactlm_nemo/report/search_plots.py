"""Plots of a search: what candidates cost and lose, how well the loss was predicted, how ranks settle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compactlm_nemo.errors import DataError
from compactlm_nemo.importance.agreement import spearman
from compactlm_nemo.report.plots import save

SMOOTHED = 10
"""A rank is that of the mean loss over a tenth of the steps so far."""
COSTS = {"latency_ms": ("milliseconds of a forward pass", 1.0), "params": ("parameters, millions", 1e6)}


def shape_label(candidate: dict[str, Any]) -> str:
    """`23 layers, hidden 576, MLP 1296, heads 9`."""
    return "{layers} layers, hidden {hidden}, MLP {ffn}, heads {heads}".format(**candidate)


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other point beats in one without losing in the other, by cost."""
    front, best = [], float("inf")
    for index in sorted(range(len(points)), key=points.__getitem__):
        if points[index][1] < best:
            best = points[index][1]
            front.append(index)
    return front


def plot_pareto(candidates: list[dict[str, Any]], path: Path) -> Figure:
    """Loss against cost, the front drawn as a line; latency is the cost where it was measured, else parameters.

    Args:
        candidates: Lines of candidates.json or ranking.json with a `loss` or `zero_shot_loss`; others are left out.
        path: PNG to write.
    """
    kind = "loss" if any(c.get("loss") is not None for c in candidates) else "zero_shot_loss"
    measured = [c for c in candidates if c.get(kind) is not None]
    if not measured:
        raise DataError(f"{path.name}: no candidate has a loss; set search.top or rank.candidates.")
    cost = next(name for name in COSTS if all(c.get(name) is not None for c in measured))
    label, unit = COSTS[cost]
    points = [(c[cost] / unit, c[kind]) for c in measured]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*zip(*points, strict=True), color="C0")
    front = [points[i] for i in pareto_front(points)]
    axes.plot(*zip(*front, strict=True), color="C1", drawstyle="steps-post", label="best at this cost")
    for index in pareto_front(points):
        axes.annotate(
            shape_label(measured[index]), points[index], xytext=(6, 4), textcoords="offset points", fontsize=7
        )
    when = "after a short distillation" if kind == "loss" else "right after the cut"
    axes.set(title=f"Candidates: validation loss {when}", xlabel=label, ylabel="LM loss, nats per token")
    axes.margins(x=0.25, y=0.1)  # room for the labels
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, path)


def plot_prediction(candidates: list[dict[str, Any]], path: Path) -> Figure:
    """Measured zero-shot loss against the predicted loss, a proxy; the title gives Spearman's rank correlation.

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
    """Candidate -> its rank, 1 is best, at every step that all curves have, by the mean of its last losses."""
    steps = min(map(len, curves.values()))
    means = np.array(
        [
            [np.mean(losses[step - max(0, step // SMOOTHED) : step + 1]) for step in range(steps)]
            for losses in curves.values()
        ]
    )
    ranks = means.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable") + 1
    return {candidate: row.tolist() for candidate, row in zip(curves, ranks, strict=True)}


def plot_rank_curves(curves: dict[int, list[float]], labels: dict[int, str], path: Path) -> Figure:
    """Distillation loss of each candidate and its rank, against the step (as figure 9 of arXiv 2407.14679).

    Args:
        curves: Candidate -> distillation loss of each step; those dropped on the way are shorter.
        labels: Candidate -> what it is called.
        path: PNG to write.
    """
    if not curves:
        raise DataError(f"{path.name}: no candidate has been trained; run recipes.rank.")
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (candidate, losses) in enumerate(sorted(curves.items())):
        left.plot(losses, color=f"C{number % 10}", linewidth=1, label=f"{candidate}: {labels[candidate]}")
    longest = max(map(len, curves.values()))
    whole = {candidate: losses for candidate, losses in curves.items() if len(losses) == longest}
    for candidate, ranks in ranks_over_steps(whole).items():
        right.plot(ranks, color=f"C{sorted(curves).index(candidate) % 10}", linewidth=1.5)
    left.set(title="Distillation loss", xlabel="step", ylabel="nats per token", yscale="log")
    left.legend(fontsize=7)
    right.set(title="Rank among those trained to the end", xlabel="step", ylabel="rank, 1 is best")
    right.invert_yaxis()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return save(figure, path)
