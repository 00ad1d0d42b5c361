"""What a run has cost so far, from manifests written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compactlm_nemo.artifacts import write_manifest
from compactlm_nemo.report.cost import cost_lines, cost_rows


def artifact(folder: Path, results: dict[str, object], seconds: float, devices: int) -> None:
    folder.mkdir(parents=True)
    write_manifest(folder, {}, {}, results, seconds=seconds, devices=devices)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    artifact(tmp_path / "run" / "tokens", {"tokens": {"train.a": 700, "heldout.a": 300}}, 36.0, 1)
    # Of a training that was stopped once the launch that finished it knows the whole time.
    artifact(tmp_path / "run" / "distill", {"tokens": 5000, "training_seconds": 3600.0}, 400.0, 8)
    rows = [
        {"model": m, "loss_a": 2.0, "tokens_a": 100, "loss_b": 1.0, "tokens_b": 50, "tokens_trained": 9} for m in "xyz"
    ]
    (tmp_path / "run" / "evaluate").mkdir()
    (tmp_path / "run" / "evaluate" / "results.json").write_text(json.dumps(rows))
    write_manifest(tmp_path / "run" / "evaluate", {}, {}, {}, seconds=90.0, devices=8)
    for candidate, seconds in ((0, 450.0), (1, 900.0)):
        artifact(tmp_path / "run" / "rank" / str(candidate) / "distill", {"tokens": 200}, seconds, 8)
    artifact(tmp_path / "elsewhere" / "score", {"tokens": 77}, 9e9, 8)
    (tmp_path / "run" / "score").symlink_to(tmp_path / "elsewhere" / "score")
    artifact(tmp_path / "run" / "report", {}, 5.0, 8)
    return tmp_path / "run"


def test_each_artifact_has_tokens_seconds_and_device_hours(run: Path) -> None:
    rows = {row["artifact"]: row for row in cost_rows(run, 2.0)}
    assert list(rows) == ["tokens", "distill", "evaluate", "candidates and rounds", "all"]
    assert [rows[name].get("tokens") for name in rows] == [1000, 5000, 450, 400, None]
    assert [rows[name]["seconds"] for name in rows] == [36, 3600, 90, 1350, 5076]
    assert [rows[name]["device_hours"] for name in rows] == pytest.approx([0.01, 8, 0.2, 3, 11.21])
    assert [rows[name]["dollars"] for name in rows] == pytest.approx([0.02, 16, 0.4, 6, 22.42])


def test_dollars_are_told_where_a_price_is_known(run: Path) -> None:
    text = "\n".join(cost_lines(run, 2.5))
    assert "| artifact | tokens | ranks | seconds | device-hours | dollars |" in text
    assert (
        "| distill | 5,000 | 8 | 3,600.0 | 8 | 20.00 |" in text and "| all | – | – | 5,076.0 | 11.21 | 28.02 |" in text
    )
    assert "A device-hour costs $2.5 (cluster.price_hour)." in text
    text = "\n".join(cost_lines(run, 0))
    assert "dollars" not in text and "$" not in text


def test_a_run_whose_manifests_tell_no_time_has_no_section(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    write_manifest(tmp_path / "teacher", {}, {}, {})
    assert cost_lines(tmp_path, 2.0) == []
