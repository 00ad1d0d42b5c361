"""Plots importance as PNG files: the scores of units, the agreement of metrics, and the scores of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from compactlm_nemo.config.score import DepthMetric
from compactlm_nemo.errors import DataError
from compactlm_nemo.importance.agreement import agreement
from compactlm_nemo.importance.names import (
    HIDDEN,
    NAME_PATTERNS,
    axis_of,
    experts_key,
    groups_key,
    heads_key,
    mlp_key,
)
from compactlm_nemo.importance.scores import Scores
from compactlm_nemo.report.plots import log_if_wide, save

TITLES = {
    "hidden": "Hidden channels",
    "heads": "Query heads",
    "groups": "Query groups",
    "mlp": "MLP neurons",
    "experts": "Experts",
    "expert_mlp": "Neurons of experts",
    "shared_expert": "Neurons of shared experts",
}
DEPTH_UNITS = {
    DepthMetric.bi: "1 − cos(in, out)",
    DepthMetric.bi_blocks: "1 − cos(in, out)",
    DepthMetric.lm_loss: "rise of the LM loss, nats per token",
    DepthMetric.lm_loss_blocks: "rise of the LM loss, nats per token",
    DepthMetric.logit_mse: "normalised squared error of the logits",
    DepthMetric.logit_mse_iterative: "normalised squared error of the logits",
    DepthMetric.tasks: "fall of accuracy",
}
COLORS = colormaps["viridis"].with_extremes(bad="white")
"""An entry without a number is white, a low one is dark."""


def plot_importance(ranking: dict[str, Tensor], path: Path) -> Figure:
    """Plot one panel an axis: neurons and hidden channels sorted by score, heads, query groups and experts by layer.

    Args:
        ranking: As `Scores.ranking` gives it; layers are those with `layers.{i}.heads`. An axis that the model does not
            have gets no panel, and the layers that lack one (dense layers have no experts) stay white in it.
        path: PNG to write.
    """
    num_layers = 0
    while heads_key(num_layers) in ranking:
        num_layers += 1
    if num_layers == 0:
        raise DataError(f"{path.name}: the scores hold no layers.0.heads; run the score stage first.")

    def vectors(key: Callable[[int], str]) -> dict[int, np.ndarray]:
        return {i: _numpy(ranking[key(i)]) for i in range(num_layers) if key(i) in ranking}

    neurons = vectors(mlp_key)
    grids = {"heads": vectors(heads_key), "groups": vectors(groups_key), "experts": vectors(experts_key)}
    grids = {axis: rows for axis, rows in grids.items() if rows}
    figure, panels = _figure(bool(neurons) + len(grids) + (HIDDEN in ranking))
    if neurons:
        _plot_neurons(figure, next(panels), neurons, num_layers)
    for axis, rows in grids.items():
        _plot_units(figure, next(panels), axis, rows, num_layers)
    if HIDDEN in ranking:
        hidden = next(panels)
        hidden.plot(np.sort(_numpy(ranking[HIDDEN]))[::-1], color="C0", linewidth=1.2)
        log_if_wide(hidden, _numpy(ranking[HIDDEN]))
        hidden.set(title=f"{TITLES[HIDDEN]}, sorted", xlabel="rank", ylabel="score")
        hidden.grid(alpha=0.3)
    return save(figure, path)


def _figure(num_panels: int) -> tuple[Figure, Iterator[Axes]]:
    """Make a figure of `num_panels` equal panels: two in a row, or three when there are more than four."""
    columns = min(num_panels, 2 if num_panels <= 4 else 3)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    return figure, (figure.add_subplot(rows, columns, i + 1) for i in range(num_panels))


def _plot_neurons(figure: Figure, axes: Axes, curves: dict[int, np.ndarray], num_layers: int) -> None:
    """Draw one sorted curve a layer, coloured by the depth of the layer."""
    deepest, colors = max(num_layers - 1, 1), colormaps["viridis"]
    log_if_wide(axes, np.concatenate(list(curves.values())))
    for layer_idx, values in curves.items():
        axes.plot(np.sort(values)[::-1], color=colors(layer_idx / deepest), linewidth=1)
    scale = ScalarMappable(Normalize(0, deepest), colors)
    figure.colorbar(scale, ax=axes, label="layer", ticks=MaxNLocator(integer=True))
    axes.set(title=f"{TITLES['mlp']}, sorted within their layer", xlabel="rank", ylabel="score")
    axes.grid(alpha=0.3)


def _plot_units(figure: Figure, axes: Axes, axis: str, rows: dict[int, np.ndarray], num_layers: int) -> None:
    """Draw a map of layers by units, each layer relative to its best unit: the cut chooses within a layer."""
    grid = np.full((num_layers, max(map(len, rows.values()))), np.nan)
    for layer_idx, values in rows.items():
        grid[layer_idx, : len(values)] = values / max(values.max(), np.finfo(values.dtype).tiny)
    image = axes.imshow(grid, aspect="auto", cmap=COLORS, vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the layer's best")
    axes.set(title=TITLES[axis], xlabel=TITLES[axis].split()[-1].lower().removesuffix("s"), ylabel="layer")
    _whole_numbers(axes)


def plot_agreement(scores: Scores, path: Path) -> Figure:
    """Plot Kendall's tau between every two width metrics, one panel an axis; a metric without the axis stays white.

    Args:
        scores: With two width metrics at least; DataError otherwise.
        path: PNG to write.
    """
    metrics = scores.width_metrics
    if len(metrics) < 2:
        raise DataError(f"{path.name}: the scores hold {metrics}, agreement needs two width metrics; see score.width.")
    taus = _taus({metric: scores.width(metric) for metric in metrics})
    figure, panels = _figure(len(taus))
    for (axis, grid), axes in zip(taus.items(), panels, strict=True):
        lowest = min(0.0, float(np.nanmin(grid)))
        image = axes.imshow(grid, cmap=COLORS, vmin=lowest, vmax=1)
        figure.colorbar(image, ax=axes, label="Kendall's tau")
        axes.set(title=f"{TITLES[axis]}: agreement of ranks")
        axes.set_xticks(range(len(metrics)), metrics, rotation=45, ha="right")
        axes.set_yticks(range(len(metrics)), metrics)
        for row, column in np.argwhere(~np.isnan(grid)):
            tau = grid[row, column]
            is_dark = tau - lowest < 0.6 * (1 - lowest)  # the colours go from dark to light
            color = "white" if is_dark else "black"
            axes.text(column, row, f"{tau:.2f}", ha="center", va="center", fontsize=7, color=color)
    return save(figure, path)


def _taus(widths: dict[str, dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Compute axis -> symmetric matrix of the metrics' correlations, NaN where a metric does not measure the axis."""
    matrices: dict[str, np.ndarray] = {}
    for axis in NAME_PATTERNS:
        parts = [{name: x for name, x in width.items() if axis_of(name) == axis} for width in widths.values()]
        if not any(parts):
            continue
        grid = np.full((len(parts), len(parts)), np.nan)
        for row, first in enumerate(parts):
            for column, second in enumerate(parts[: row + 1]):
                if first and second:
                    grid[row, column] = grid[column, row] = 1.0 if row == column else agreement(first, second)[axis]
        matrices[axis] = grid
    return matrices


def plot_depth(scores: Scores, path: Path) -> Figure:
    """Plot one panel a depth metric: a curve over the layers in the metric's unit, or blocks of layers as a heat map.

    Args:
        scores: With one depth metric at least; DataError otherwise. Entries that are no number stay white.
        path: PNG to write.
    """
    if not scores.depth_metrics:
        raise DataError(f"{path.name}: the scores hold no depth metric; name one in score.depth.")
    figure, panels = _figure(len(scores.depth_metrics))
    for metric, axes in zip(scores.depth_metrics, panels, strict=True):
        values, unit = _numpy(scores.depth(metric)), DEPTH_UNITS[DepthMetric[metric]]
        axes.set(title=metric, xlabel="layer", ylabel=unit)
        if values.ndim == 1:
            axes.plot(values, color="C0", linewidth=1.2, marker=".")
            log_if_wide(axes, values)
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            _plot_blocks(figure, axes, values, unit)
    return save(figure, path)


def _plot_blocks(figure: Figure, axes: Axes, values: np.ndarray, unit: str) -> None:
    """Draw a map of blocks, first layer by number of layers; column 0 is blocks of one layer."""
    num_layers = len(values)
    extent = (0.5, num_layers + 0.5, num_layers - 0.5, -0.5)
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(shown, aspect="auto", cmap=COLORS, interpolation="nearest", extent=extent)
    figure.colorbar(image, ax=axes, label=unit)
    axes.set(xlabel="layers in the block", ylabel="first layer")
    _whole_numbers(axes)


def _whole_numbers(axes: Axes) -> None:
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_locator(MaxNLocator(integer=True))


def _numpy(score: Tensor) -> np.ndarray:
    return score.detach().cpu().double().numpy()
