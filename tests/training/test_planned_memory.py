"""What a plan says of a training is logged beside what is measured, if it is of the same layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compactlm_nemo.config.load import compose
from compactlm_nemo.config.schema import Config
from compactlm_nemo.training.callbacks import PeakMemory, Step
from compactlm_nemo.training.planned_memory import PLAN_FILE, planned_bytes, planned_layout


def settings(folder: Path, *words: str) -> Config:
    return compose(["model.source=none", f"run.dir={folder}", *words])


def write_plan(folder: Path, **changes: Any) -> None:
    stages = [{"stage": "score", "peak_bytes": 1}, {"stage": "distill", "peak_bytes": 7}]
    plan = {"ranks": 2, "layout": planned_layout(settings(folder)), "stages": stages} | changes
    (folder / PLAN_FILE).write_text(json.dumps(plan))


def test_a_plan_of_this_layout_is_used(tmp_path: Path) -> None:
    write_plan(tmp_path)
    assert planned_bytes(settings(tmp_path), "distill", 2) == 7
    assert planned_bytes(settings(tmp_path, "distill.lr=1e-3"), "distill", 2) == 7


@pytest.mark.parametrize("words", [["distill.micro_batch=2"], ["parallel.tp=2"], ["data.sequence_length=64"]])
def test_a_plan_of_another_layout_is_not(tmp_path: Path, words: list[str]) -> None:
    write_plan(tmp_path)
    assert planned_bytes(settings(tmp_path, *words), "distill", 2) is None
    assert planned_bytes(settings(tmp_path), "distill", 4) is None
    assert planned_bytes(settings(tmp_path), "correct_teacher", 2) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ranks": 2'])
def test_a_file_that_is_no_plan_is_none(tmp_path: Path, text: str) -> None:
    assert planned_bytes(settings(tmp_path), "distill", 2) is None
    (tmp_path / PLAN_FILE).write_text(text)
    assert planned_bytes(settings(tmp_path), "distill", 2) is None


def test_both_are_metrics_of_a_step() -> None:
    for planned in (None, 7):
        step = Step(number=0, model=None, batches=[], metrics={})  # type: ignore[arg-type]
        PeakMemory(planned).after_step(step)
        assert step.metrics["perf/peak_memory_bytes"] > 1e6
        assert step.metrics.get("perf/planned_memory_bytes") == planned
