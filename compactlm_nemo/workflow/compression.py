"""The door for Python: a run of the recipes from a notebook or a program, by the functions that the recipes call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.artifacts import read_manifest
from compactlm_nemo.config.load import HYDRA_ERRORS, compose, one_line
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.values import overrides_of
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.workflow.compress import compress
from compactlm_nemo.workflow.runner import run_stages
from compactlm_nemo.workflow.stage_table import STAGES

if TYPE_CHECKING:
    from compactlm_nemo.importance.scores import Scores


class Compression:
    """A run in a folder: its settings are those of the command line, and what is done there is not done again.

    Every method does the stages before its own that are not done. A wrong setting, text or model raises an error of
    `compactlm_nemo.errors`, with the line that a recipe would print. Ctrl-C, or the stop button of a notebook, raises
    `Interrupted` where the work is saved: the same call goes on from there.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Check the settings.

        Args:
            settings: Dotted names, `{"run.dir": "runs/first", "search.ffn": [9216]}`, or mappings in each other;
                `experiment` and `model` name files of conf/.

        Raises:
            ConfigError: a setting that is not known, or a value that it cannot have.
        """
        try:
            self.config: Config = compose(overrides_of(settings))
        except HYDRA_ERRORS as error:
            raise ConfigError(one_line(error)) from None

    def plan(self) -> None:
        """Check everything and print the configuration, sizes and what would be written, as `dry_run=true` does."""
        run_stages(replace(self.config, dry_run=True))

    def run(self, until: str | None = None) -> None:
        """Do all stages in order, `until` the last, or this one; `recipes.compress` is this function."""
        compress(self.config, until)

    def results(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage left in its manifest, `loss` and `tokens` of distill for example."""
        results: dict[str, Any] = read_manifest(self.folder(stage))["results"]
        return results

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's artifact.

        Raises:
            ConfigError: there is no such stage.
        """
        if stage not in STAGES:
            raise ConfigError(f"there is no stage {stage}; name one of {', '.join(STAGES)}.")
        return Path(self.config.run.dir) / STAGES[stage].writes

    def score(self) -> Scores:
        """Return the importance of every unit and layer of the teacher."""
        from compactlm_nemo.importance.scores import load_scores

        self.run("score")
        return load_scores(self.folder("score"))

    def prune(self) -> dict[str, Any]:
        """Cut the student, and return its `shape`, `params`, and `loss_before` and `loss_after` the cut in nats."""
        self.run("prune")
        return self.results("prune")

    def distill(self) -> dict[str, Any]:
        """Train the student, and return the `tokens` that it saw and its `loss` on validation windows in nats."""
        self.run("distill")
        return self.results("distill")

    def evaluate(self) -> list[dict[str, Any]]:
        """Return held-out losses, sizes and speed of teacher, pruned and distilled student, a row each."""
        import json

        self.run("evaluate")
        rows: list[dict[str, Any]] = json.loads((self.folder("evaluate") / "results.json").read_text())
        return rows

    def export(self) -> Path:
        """Return the Hugging Face folder of `export.of`; only the stages that it reads are done."""
        wanted = [*STAGES["export"].artifacts(self.config)]
        self.run(next(name for name, stage in reversed(STAGES.items()) if stage.writes in wanted))
        run_stages(self.config, only="export")
        return Path(self.results("export")["folder"])
