"""Writes the metrics of the evaluate stage as a table, with their intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compactlm_nemo.report.figures import is_slice
from compactlm_nemo.report.tables import comparison_markdown

LARGEST_P = 0.05
"""Below it a difference from the teacher has a star."""


def quality_rows(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a metric; slices of a text (`loss/wiki/short`) have none."""
    return [
        {"metric": metric["metric"], "units": f"{metric['num_units']:,} {metric['units']}"}
        | {model: _cell(value, metric["against_teacher"].get(model)) for model, value in metric["models"].items()}
        for metric in metrics
        if not is_slice(metric["metric"])
    ]


def quality_lines(run_dir: Path) -> list[str]:
    """Return the report's lines about `quality.json`; none where a run was evaluated before there was one."""
    path = run_dir / "evaluate" / "quality.json"
    if not path.is_file():
        return []
    rows = quality_rows(json.loads(path.read_text())["metrics"])
    # A column for every model, the teacher first, though not every metric has them all.
    models = dict.fromkeys(["metric", "units", "teacher", *(key for row in rows for key in row)])
    table = comparison_markdown([{key: row.get(key) for key in models} for row in rows])
    legend = f"Value and 95 % interval; * where it differs from the teacher's with p < {LARGEST_P} (docs/quality.md):"
    return ["## Quality", "", legend, "", table]


def _cell(value: dict[str, float | None], difference: dict[str, float | None] | None) -> str:
    p = difference["p"] if difference else None
    star = "*" if p is not None and p < LARGEST_P else ""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.4f}{star}"
    return f"{value['value']:.4f}{star} ({value['low']:.4f} to {value['high']:.4f})"
