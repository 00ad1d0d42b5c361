"""What a stage declares is what it does: artifacts, files, the table, recipes and settings."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import pytest

from compactlm_nemo import stages
from compactlm_nemo.config.load import CONF, compose
from compactlm_nemo.stages.context import Run
from compactlm_nemo.workflow.stage_table import MAKERS, STAGES, stages_of

FOLDER = Path(stages.__path__[0])
CONFIG = compose(["run.dir=runs/x", "model.source=y"])
STORED = compose(["run.dir=runs/x", "model.source=y", "distill.teacher=stored", "correct.steps=5"])


def test_a_stage_may_open_only_what_it_declares() -> None:
    run = Run(CONFIG, mesh=None, stage=STAGES["score"])  # type: ignore[arg-type]
    assert run.path("teacher") == Path("runs/x/teacher") and run.path("score") == Path("runs/x/score")
    with pytest.raises(ValueError, match="stage score does not declare that it reads student; add it to `reads`"):
        run.path("student")


def test_further_artifacts_depend_on_the_settings() -> None:
    for config, allowed in ((CONFIG, False), (STORED, True)):
        run = Run(config, mesh=None, stage=STAGES["distill"])  # type: ignore[arg-type]
        for artifact in ("targets", "corrected"):
            if allowed:
                assert run.path(artifact).name == artifact
            else:
                with pytest.raises(ValueError, match=f"reads {artifact}"):
                    run.path(artifact)


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_a_stage_reads_what_stages_before_it_make(stage: stages.stage.Stage) -> None:
    before = list(STAGES.values())[: list(STAGES).index(stage.name)]
    for config in (CONFIG, STORED):
        assert set(stage.artifacts(config)) <= {other.writes for other in before}
        if stage.is_wanted(config):
            assert {MAKERS[artifact].name for artifact in stage.artifacts(config)} <= set(stages_of(config))


def test_a_stage_is_a_file_a_recipe_and_a_line_of_the_table() -> None:
    declaring = {path.stem for path in FOLDER.glob("*.py") if "\nSTAGE = Stage(" in path.read_text()}
    assert declaring == set(STAGES)
    for name in STAGES:
        assert (CONF.parent / "recipes" / f"{name}.py").is_file()
        assert f'name="{name}"' in (FOLDER / f"{name}.py").read_text()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_artifacts_are_opened_by_their_names_alone(path: Path) -> None:
    """A path below `run.dir` that no stage declares: only the context makes them, and what stands beside the stages."""
    # ranking.json, the plan of a push, the page, names
    allowed = {"context.py": 2, "distill.py": 1, "prune.py": 1, "push.py": 1, "report.py": 1, "training_run.py": 1}
    uses = [node for node in ast.walk(ast.parse(path.read_text())) if ast.unparse(node).endswith("config.run.dir")]
    assert len([node for node in uses if isinstance(node, ast.Attribute)]) == allowed.get(path.name, 0)


def test_adding_a_stage_takes_an_object_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain and the checks see a stage that the table has."""
    toy = replace(
        STAGES["export"],
        name="toy", reads=("teacher",), writes="toy",
        problems=lambda config, models: ["toy.size=0 must be > 0; use 1."],
    )  # fmt: skip
    monkeypatch.setitem(STAGES, "toy", toy)
    assert stages_of(CONFIG)[-1] == "toy"
    from compactlm_nemo.workflow.preflight import rule_problems

    assert "toy.size=0 must be > 0; use 1." in rule_problems(CONFIG, None)


def test_every_stage_says_what_it_makes() -> None:
    for stage in STAGES.values():
        assert " -> " in stage.summary and inspect.getdoc(stage.run)
