"""The report's part about speed: every row of profile.json, and what share of the expected saving arrived."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from compactlm_nemo.report.markdown import write_report
from tests.report.test_report import finished_run, three_metrics


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median}


def model(seconds: float, peak_bytes: int | None) -> dict[str, Any]:
    return {
        "disk_bytes": 300 * 2**20, "peak_bytes": peak_bytes,
        "batches": [
            {"batch": batch, "generated_tokens": 8 * batch, "first_token_seconds": spread(seconds * batch),
             "step_seconds": spread(seconds / 10), "decode_tokens_per_second": spread(10 * batch / seconds),
             "tokens_per_second": spread(5 * batch / seconds)}
            for batch in (1, 8)
        ],
    }  # fmt: skip


def ratios(batch: int, prefill: float, decode: float) -> dict[str, Any]:
    return {
        "batch": batch,
        "prefill": spread(prefill) | {"share_of_saving": {"prompt_flops": (1 - prefill) / 0.4}},
        "decode": spread(decode) | {"share_of_saving": {"weights": (1 - decode) / 0.25, "answer_flops": None}},
    }


PROFILE = {
    "exported": "distilled", "text": "wiki", "dtype": "float32", "prompt_tokens": 64, "new_tokens": 8, "repeats": 3,
    "expected": {"prompt_flops": 0.6, "answer_flops": 1.0, "weights": 0.75},
    "models": {"teacher": {"params": 134_515_008}, "student": {"params": 100_195_776}},
    "engines": [
        {"engine": "transformers", "version": "5.0", "device": "a CPU", "threads": 2,
         "models": {"teacher": model(0.2, 600 * 2**20), "student": model(0.1, None)},
         "ratios": [ratios(1, 0.7, 0.8), ratios(8, 0.6, 1.05)]},
    ],
}  # fmt: skip
ROWS = [
    "| 1 | teacher | 134,515,008 | 200.0 (180.0 to 220.0) | 50.0 (45.0 to 55.0) | 25.0 (22.5 to 27.5) | 600 | 300 |",
    "| 8 | student | 100,195,776 | 800.0 (720.0 to 880.0) | 800.0 (720.0 to 880.0) "
    "| 400.0 (360.0 to 440.0) | – | 300 |",
    "| 1 | prefill | 0.700 (0.630 to 0.770) | 0.600 by FLOPs | 75% |",
    "| 1 | decode | 0.800 (0.720 to 0.880) | 0.750 by weights read | 80% |",
    "| 1 | decode | 0.800 (0.720 to 0.880) | 1.000 by FLOPs | none expected |",
    "| 8 | prefill | 0.600 (0.540 to 0.660) | 0.600 by FLOPs | 100% |",
    "| 8 | decode | 1.050 (0.945 to 1.155) | 0.750 by weights read | -20% |",
]


def test_both_reports_show_every_row_of_the_profile(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "a", three_metrics(), {"search.width": None, "search.depth": None})
    (run / "profile").mkdir()
    (run / "profile" / "profile.json").write_text(json.dumps(PROFILE))
    write_report(run, run / "report", profile=run / "profile")
    text = (run / "report" / "report.md").read_text()
    assert "## Speed where it runs" in text and "transformers 5.0, a CPU, 2 threads:" in text
    for row in ROWS:
        assert f"{row}\n" in text
    html = (run / "report" / "report.html").read_text()
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)]
    for row in ROWS:
        assert row.strip("| ").split(" | ") in cells
    write_report(run, run / "report")
    assert "Speed where it runs" not in (run / "report" / "report.md").read_text()
