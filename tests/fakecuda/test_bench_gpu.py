"""The parts of bench.gpu have no tensor on a wrong device, and ask for no more memory than a card has."""

from __future__ import annotations

import contextlib
import importlib
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.fakecuda.cluster import cluster, skip_without_fake_cuda

skip_without_fake_cuda()

from bench.gpu import models  # noqa: E402
from bench.gpu.record import Record  # noqa: E402
from bench.gpu.step import layers_that_fit  # noqa: E402


@pytest.mark.parametrize("part", ["head", "step", "scoring", "cut", "checkpoint"])
def test_a_part_runs_on_the_device(part: str, tmp_path: Path) -> None:
    module: Any = importlib.import_module(f"bench.gpu.{part}")
    record = Record(tmp_path / "record.json", 600.0, has_goals=False)
    there = []

    @contextlib.contextmanager
    def launched(*_: object, **__: object) -> Any:
        with cluster() as each:
            there.append(each)
            yield each.mesh

    answers = iter([False, True])  # of numbers that are not there: changed by a step, the same once loaded
    with contextlib.ExitStack() as stack:
        for name, value in {
            "launched": launched,
            "ROUNDS": 1,
            "CLOSE": math.inf,
            "are_equal": lambda *_: next(answers),
        }.items():
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, value))
        if part == "head":
            there.append(stack.enter_context(cluster()))
        module.measure(record, dry=True)
    errors = [error for error in record.details.get("errors", {}).values() if "'liger_kernel'" not in error]
    assert not errors
    assert record.figures and there[0].counts.kernels


def test_the_layers_that_fit_leave_room_on_an_80_gb_card() -> None:
    teacher, student = models.shapes(models.settings(dry=False), dry=False)
    assert 8 <= layers_that_fit(teacher, student, 8192) < student.num_layers
