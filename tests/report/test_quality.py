"""The table of metrics in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compactlm_nemo.report.quality import quality_lines


def value(value: float, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


METRICS: list[dict[str, Any]] = [
    {
        "metric": "kl/wiki", "units": "documents", "num_units": 1234, "is_better": "lower",
        "models": {"pruned": value(0.25, 0.125, 0.5)}, "against_teacher": {},
    },
    {
        "metric": "loss/wiki", "units": "documents", "num_units": 1, "is_better": "lower",
        "models": {"teacher": value(2, 1.5, 2.5), "pruned": value(3, None, None), "distilled": value(2.25, 2, 3)},
        "against_teacher": {
            "pruned": {**value(1, None, None), "p": 0.049}, "distilled": {**value(0.25, -1, 1), "p": 0.05},
        },
    },
    {
        "metric": "loss/wiki/short", "units": "documents", "num_units": 1, "is_better": "lower",
        "models": {"teacher": value(9, 9, 9)}, "against_teacher": {},
    },
]  # fmt: skip


def test_a_star_stands_where_chance_is_unlikely(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "quality.json").write_text(json.dumps({"metrics": METRICS}))
    table = quality_lines(tmp_path, tmp_path, {})[-1].splitlines()
    assert table == [
        "| metric | units | teacher | pruned | distilled |",
        "| --- | --- | --- | --- | --- |",
        "| kl/wiki | 1,234 documents | – | 0.2500 (0.1250 to 0.5000) | – |",
        "| loss/wiki | 1 documents | 2.0000 (1.5000 to 2.5000) | 3.0000* | 2.2500 (2.0000 to 3.0000) |",
    ]


def test_a_run_without_metrics_has_no_table(tmp_path: Path) -> None:
    assert quality_lines(tmp_path, tmp_path, {}) == []
