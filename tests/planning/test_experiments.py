"""Every experiment for a cluster fits there by the plan, and docs/planning.md says what the plan says of it."""

from __future__ import annotations

import pytest

from compactlm_nemo.planning.layouts import planned_layout
from compactlm_nemo.workflow.layout_checks import launch_problems
from tests.support.planned import GIB, documented, models, on_clusters, planned, settings

QUICK = ("nemotron4_15b_to_8b",)
"""The others are slow tests for their number alone."""


def limit_gib(name: str) -> float:
    run = settings(name)
    return run.cluster.memory_gib * (1 - run.plan.margin)


def test_every_experiment_for_a_cluster_names_it_and_has_a_row_that_fits() -> None:
    rows = documented()
    assert set(rows) == set(on_clusters()) and len(rows) >= 8
    for name, row in rows.items():
        run = settings(name)
        assert run.cluster.is_gpu and (row.nodes, row.device) == (run.nodes, run.cluster.device), name
        assert row.gib <= limit_gib(name), name
        assert launch_problems(run, run.meant_ranks) == "", name


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in on_clusters()]
)
def test_the_row_of_an_experiment_is_the_plans(name: str) -> None:
    row, told = planned(name), documented()[name]
    assert row.gib <= limit_gib(name)
    assert told[2:] == pytest.approx(row[2:], rel=0.02), "python -m tests.support.planned makes the rows anew"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in on_clusters() if settings(name).parallel.pp > 1])
def test_an_experiment_in_a_pipeline_fits_when_its_stages_are_simulated_as_they_are(name: str) -> None:
    run = settings(name)
    layout = planned_layout(run, *models(run), run.meant_ranks)
    assert layout.bytes / GIB <= limit_gib(name)
