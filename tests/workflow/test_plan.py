"""`recipes.plan` on a small run, read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import run
from tests.support.tiny_run import command


def words(inputs: Path, folder: Path, *overrides: str) -> list[str]:
    return command(inputs, folder, "cluster=cpu", *overrides, recipe="plan")


def test_every_stage_that_computes_has_a_row(inputs: Path, tmp_path: Path) -> None:
    done = run(words(inputs, tmp_path / "run", "nodes=1"))
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["ranks"] == 2 and plan["cluster"] == "CPU, 2 cores"
    stages = {row["stage"]: row for row in plan["stages"]}
    assert list(stages) == ["import_model", "score", "search", "prune", "distill", "evaluate", "export"]
    training = stages["distill"]["parts"][0]
    each = sum(training["seconds_each_time"][part] for part in ("arithmetic", "memory", "links", "bubble"))
    assert training["times"] == 6 and training["seconds"] == pytest.approx(6 * each)
    assert training["peak_bytes"] == sum(training["peak_bytes_by_kind"].values())
    for name, row in stages.items():
        assert name in done.stdout
        assert row["seconds"] == pytest.approx(sum(part["seconds"] for part in row["parts"]) + row["storage_seconds"])
        assert row["peak_bytes"] == max([part["peak_bytes"] for part in row["parts"]], default=0)
    for name in ("score", "distill", "evaluate"):
        assert stages[name]["parts"][0]["flops"] > 0 and stages[name]["peak_bytes"] > 4 * plan["teacher_params"], name
    # In fp32 weights and both moments in each of two checkpoints and one that is being written, and the student.
    assert stages["distill"]["disk_bytes"] == (3 * 12 + 4) * plan["student_params"]
    assert stages["import_model"]["disk_bytes"] == 4 * plan["teacher_params"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"plan.json", "plan.png"}


@pytest.mark.slow
def test_the_best_layout_can_be_pasted(inputs: Path, tmp_path: Path) -> None:
    done = run(words(inputs, tmp_path / "run", "nodes=2", "plan.search=true", "distill.micro_batch=1"))
    assert done.returncode == 0, done.stderr
    overrides = json.loads((tmp_path / "run" / "plan.json").read_text())["overrides"]
    assert overrides == done.stdout.splitlines()[1]
    again = run(words(inputs, tmp_path / "again", "nodes=2", *overrides.split()))
    assert again.returncode == 0, again.stderr


def test_what_is_left_out_is_said(inputs: Path, tmp_path: Path) -> None:
    refit = [
        "score.second_moments=true",
        "prune.reconstruct=least_squares",
        "prune.sequential=true",
        "prune.blocks=distill",
    ]
    done = run(words(inputs, tmp_path / "run", "search.latency_ms=1e6", *refit))
    assert done.returncode == 0, done.stderr
    left_out = [line for line in done.stdout.splitlines() if line.startswith("not in this plan: ")]
    assert [line.removeprefix("not in this plan: ") for line in left_out] == [
        "search: the algebra of the refit, on the host", "search: the refit layer by layer",
        "search: the timing of layers for search.latency_ms",
        "prune: the algebra of the refit, on the host", "prune: the refit layer by layer",
        "prune: the training of each layer by itself",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["cluster.device=null"], "cluster=NAME must be given; conf/cluster/ has a100_40gb,"),
        (["nodes=0"], "nodes=0 must be > 0"),
        (["cluster.memory_share=2"], "cluster.memory_share=2.0 must be in (0, 1]"),
        (["nodes=16"], "distill.global_batch=4 must be a multiple"),
        (["cluster.memory_gib=1e-4", "plan.search=true"], "hold this run in no layout"),
    ],
)
def test_what_cannot_be_is_one_line(inputs: Path, tmp_path: Path, overrides: list[str], line: str) -> None:
    done = run(words(inputs, tmp_path / "run", *overrides))
    errors = [each for each in done.stderr.splitlines() if each.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and line in errors[0], done.stderr
    assert not (tmp_path / "run").exists()
