"""Every experiment for a cluster fits there by the plan, and docs/planning.md says what the plan says of it."""

from __future__ import annotations

from typing import Any

import pytest

from compactlm_nemo.planning.layouts import simulated_layout
from compactlm_nemo.workflow.layout_checks import launch_problems
from tests.support.planned import GIB, documented, models, on_clusters, planned, settings


def cases(*, in_pipelines: bool) -> list[Any]:
    return [name for name in on_clusters() if (settings(name).parallel.pp > 1) == in_pipelines]


def limit_gib(name: str) -> float:
    run = settings(name)
    return run.cluster.memory_gib * (1 - run.plan.margin)


def test_every_experiment_for_a_cluster_names_it_and_has_a_row() -> None:
    assert set(documented()) == set(on_clusters()) and len(on_clusters()) >= 8
    for name in on_clusters():
        run = settings(name)
        assert run.cluster.device is not None and run.cluster.is_gpu, name
        assert launch_problems(run, run.meant_ranks) == "", name


@pytest.mark.parametrize(
    "name", [*cases(in_pipelines=False), *(pytest.param(n, marks=pytest.mark.slow) for n in cases(in_pipelines=True))]
)
def test_an_experiment_fits_and_its_row_is_the_plans(name: str) -> None:
    row, told = planned(name), documented()[name]
    assert row.gib <= limit_gib(name)
    assert row[:2] == told[:2]
    assert told[2:] == pytest.approx(row[2:], rel=0.02), "python -m tests.support.planned makes the rows anew"


@pytest.mark.parametrize("name", cases(in_pipelines=True))
def test_an_experiment_in_a_pipeline_fits_by_the_arithmetic_of_the_search(name: str) -> None:
    """The quick part of the slow test above: its fullest rank is that of the first stage."""
    run = settings(name)
    layout = simulated_layout(run, *models(run), run.meant_ranks)
    assert layout.bytes / GIB <= limit_gib(name)
