"""The memory of a rank over one training step, as areas by kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from compactlm_nemo.report.plots import save

GIB = 2**30
POINTS = 1000
"""Most moments that are drawn; of those between two the fullest is."""


def plot_memory(curve: list[dict[str, int]], limit: float, path: Path) -> Figure:
    """Draw bytes by kind after each allocation and release, the fullest moment, and what a device may hold.

    Args:
        curve: Kind -> bytes alive, moment after moment.
        limit: Bytes.
    """
    kinds = sorted({kind for moment in curve for kind in moment})
    sizes = np.array([[moment.get(kind, 0) for moment in curve] for kind in kinds]) / GIB
    whole = sizes.sum(axis=0)
    parts = np.array_split(np.arange(len(curve)), min(POINTS, len(curve)))
    shown = np.array([part[whole[part].argmax()] for part in parts])
    order = np.argsort([(np.ptp(row), -row.mean()) for row in sizes], axis=0)[:, 0]  # what stays lies below
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(shown, sizes[order][:, shown], labels=[kinds[row] for row in order], linewidth=0)
    top = int(whole.argmax())
    axes.annotate(
        f"{whole[top]:.1f} GiB", (top, whole[top]), xytext=(0, 6), textcoords="offset points", ha="center", va="bottom"
    )
    if limit / GIB < 3 * whole[top]:
        axes.axhline(limit / GIB, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"limit {limit / GIB:.1f} GiB", (0, limit / GIB), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="allocations and releases of a step, in order", ylabel="GiB on a rank", xlim=(0, len(curve) - 1))
    axes.set_ylim(0, 1.15 * max(whole[top], limit / GIB if limit / GIB < 3 * whole[top] else 0))
    axes.set_xticks([])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return save(figure, path)
