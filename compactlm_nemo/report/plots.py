"""Plots of a run as PNG files. `Figure` is used directly: no pyplot, so no display and no global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from compactlm_nemo.errors import DataError
from compactlm_nemo.search.select import DEPTH, HIDDEN, heads_key, mlp_key

KD, LM, TEACHER_LM = "train/kd_logit_nats", "train/lm_loss_nats", "train/teacher_lm_loss_nats"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def plot_loss_curve(metrics: list[dict[str, Any]], path: Path) -> None:
    """Distillation loss, and the LM loss of student and teacher, against the step; in nats per token.

    Args:
        metrics: Lines with `step` and any of the three `train/` keys above; other lines and keys are skipped.
        path: PNG to write.
    """
    series = {
        key: [(row["step"], row[key]) for row in metrics if key in row and "step" in row]
        for key in (KD, LM, TEACHER_LM)
    }
    if not any(series.values()):
        raise DataError(f"{path.name}: no metric line has step and one of {', '.join(series)}; distil first.")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, series[KD], "KL(teacher ‖ student)", "C0")
    _curve(right, series[LM], "student", "C0")
    _curve(right, series[TEACHER_LM], "teacher", "C1")
    left.set(title="Distillation loss", xlabel="step", ylabel="nats per token")
    right.set(title="Training LM loss", xlabel="step", ylabel="nats per token")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend()
    if left.lines and min(value for _, value in series[KD]) > 0:
        left.set_yscale("log")
    _save(figure, path)


def _curve(axes: Axes, points: list[tuple[float, float]], label: str, color: str) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=label, color=color, linewidth=1.2, marker="." if len(points) < 30 else None)


def plot_importance(scores: dict[str, Tensor], path: Path) -> None:
    """Four panels: neurons of each layer sorted by score, query heads by layer, layers, hidden channels sorted.

    Args:
        scores: As in scores.safetensors; layers are those with `layers.{i}.heads`.
        path: PNG to write.
    """
    num_layers = 0
    while heads_key(num_layers) in scores:
        num_layers += 1
    if num_layers == 0:
        raise DataError(f"{path.name}: the scores hold no layers.0.heads; run the score stage first.")
    figure = Figure(figsize=(12, 8), layout="constrained")
    (mlp, heads), (depth, hidden) = figure.subplots(2, 2)
    _plot_neurons(figure, mlp, [_numpy(scores[mlp_key(i)]) for i in range(num_layers)])
    grid = np.stack([_numpy(scores[heads_key(i)]) for i in range(num_layers)])
    grid = grid / np.maximum(grid.max(axis=1, keepdims=True), np.finfo(grid.dtype).tiny)
    image = heads.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=heads, label="share of the layer's best head")
    heads.set(title="Query heads", xlabel="head", ylabel="layer")
    depth.bar(range(num_layers), _numpy(scores[DEPTH]), color="C0")
    depth.set(title="Layers", xlabel="layer", ylabel="block importance, 1 − cos(in, out)")
    hidden.semilogy(np.sort(_numpy(scores[HIDDEN]))[::-1], color="C0", linewidth=1.2)
    hidden.set(title="Hidden channels, sorted", xlabel="rank", ylabel="score")
    for axes in (heads, depth):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    heads.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (mlp, depth, hidden):
        axes.grid(alpha=0.3)
    _save(figure, path)


def _plot_neurons(figure: Figure, axes: Axes, curves: list[np.ndarray]) -> None:
    """One sorted curve a layer, coloured by its depth."""
    deepest, colors = max(len(curves) - 1, 1), colormaps["viridis"]
    for layer_idx, values in enumerate(curves):
        axes.semilogy(np.sort(values)[::-1], color=colors(layer_idx / deepest), linewidth=1)
    scale = ScalarMappable(Normalize(0, deepest), colors)
    figure.colorbar(scale, ax=axes, label="layer", ticks=MaxNLocator(integer=True))
    axes.set(title="MLP neurons, sorted within their layer", xlabel="rank", ylabel="score")


def _numpy(score: Tensor) -> np.ndarray:
    return score.detach().cpu().double().numpy()


def plot_sizes(rows: list[dict[str, Any]], path: Path) -> None:
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
    _save(figure, path)
