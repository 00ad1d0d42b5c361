"""Compares two scores files of one model: how each was measured, and how far their rankings of the units agree."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from compactlm_nemo.artifacts import differences
from compactlm_nemo.config.evaluate import CompareConfig
from compactlm_nemo.config.score import WidthMetric
from compactlm_nemo.errors import ConfigError, DataError
from compactlm_nemo.importance.agreement import per_vector, spearman
from compactlm_nemo.importance.names import DEPTH, axis_of
from compactlm_nemo.importance.scores import Scores, load_scores
from compactlm_nemo.report.tables import print_table

DIGEST_LETTERS = 12
"""Letters of a fingerprint that tell models apart by eye."""


def compare(config: CompareConfig, console: Console) -> None:
    """Print how two files differ, above a table of rank correlations; a dry run only checks the files."""
    a, b = load_scores(Path(config.a)), load_scores(Path(config.b))
    check_same_model(config, a, b)
    pairs = metric_pairs(config, a, b)
    if config.dry_run:
        return
    for line in header_lines(a, b):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    print_table(console, "Agreement of ranks", comparison_rows(a, b, pairs))


def check_same_model(config: CompareConfig, a: Scores, b: Scores) -> None:
    """Raise DataError unless both files are of one model: ranks of different models' units cannot be compared."""
    first, second = (scores.metadata.get("model", "(unknown)") for scores in (a, b))
    if first != second:
        raise DataError(
            f"scores of different models cannot be compared: a={config.a} is of model {first[:DIGEST_LETTERS]}, "
            f"b={config.b} of model {second[:DIGEST_LETTERS]}; score one model twice."
        )


def metric_pairs(config: CompareConfig, a: Scores, b: Scores) -> list[tuple[str, str]]:
    """Return the pairs (metric of a, metric of b) to compare; ConfigError when one is missing or none is common."""
    if config.width_a and config.width_b:
        _require_metric("width_a", config.width_a, config.a, a)
        _require_metric("width_b", config.width_b, config.b, b)
        return [(config.width_a.name, config.width_b.name)]
    metrics_a, metrics_b = ([*scores.width_metrics, *scores.depth_metrics] for scores in (a, b))
    if shared := [metric for metric in metrics_a if metric in metrics_b]:
        return [(metric, metric) for metric in shared]
    raise ConfigError(
        f"a holds {metrics_a} and b {metrics_b}, nothing in both; name two metrics by width_a and width_b."
    )


def _require_metric(key: str, metric: WidthMetric, path: str, scores: Scores) -> None:
    if metric.name not in scores.width_metrics:
        raise ConfigError(f"{key}={metric.name} is not in {path}; it holds {scores.width_metrics}, name one of them.")


def header_lines(a: Scores, b: Scores) -> list[str]:
    """Return lines that name the model, and each circumstance of the measurement in which a and b differ."""
    lines = [f"model {a.metadata.get('model', '(unknown)')[:DIGEST_LETTERS]}"]
    return lines + (differences(a.metadata, b.metadata, "differs: ") or ["measured under the same circumstances"])


def comparison_rows(a: Scores, b: Scores, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return one row for every axis of every pair of metrics; a correlation is the mean over the axis's vectors."""
    rows = []
    for first, second in pairs:
        if first in a.depth_metrics:
            vectors = _measured_in_both(first, a.depth(first), b.depth(second))
        else:
            vectors = a.width(first), b.width(second)
        rhos = per_vector(*vectors, spearman)
        for axis, taus in per_vector(*vectors).items():
            rows.append(
                {
                    "metric": first if first == second else f"{first} vs {second}",
                    "axis": axis,
                    "vectors": len(taus),
                    "values": sum(x.numel() for name, x in vectors[0].items() if axis_of(name) == axis),
                    "Kendall tau": f"{fmean(taus):.4f}",
                    "lowest tau": f"{min(taus):.4f}",
                    "Spearman": f"{fmean(rhos[axis]):.4f}",
                }
            )
    return rows


def _measured_in_both(metric: str, a: Tensor, b: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Select the entries of a depth metric that are a number in both files: no block goes beyond the last layer."""
    if a.shape != b.shape:
        raise DataError(f"axis {DEPTH}: {metric} is {list(a.shape)} in a and {list(b.shape)} in b, of other models.")
    measured = torch.isfinite(a) & torch.isfinite(b)
    if not bool(measured.any()):
        raise DataError(f"axis {DEPTH}: no entry of {metric} is a number in both files; run the score stage again.")
    return {DEPTH: a[measured]}, {DEPTH: b[measured]}
