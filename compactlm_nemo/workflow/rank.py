"""Candidates told apart by training each a little: prune and short distillation of the best, then a ranking.

Every candidate is a run of its own in `run.dir/rank/{index}`, whose first stages are links to those of the whole run.
So its stages are skipped when done, a killed one goes on, and the tasks of a Slurm array share nothing but the inputs.
All see the same batches in the same order. Result: `rank/ranking.json`, best first: by validation loss, or as `rank.by`
weighs the accuracy on tasks with it.

Source: Minitron (arXiv 2407.14679), section 2.3; halving: Jamieson and Talwalkar 2016, arXiv:1502.07943.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import read_manifest, write_json
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.workflow import LOSS, RankConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.evaluation.harness import ACCURACIES
from compactlm_nemo.models.hub import COMMITS
from compactlm_nemo.parallel.world import is_main_rank, launch_world_size
from compactlm_nemo.report.figures import DISTILLED, PRUNED, Measured, measured
from compactlm_nemo.training.tracker import LOSS as TRAINED_LOSS
from compactlm_nemo.training.tracker import METRICS
from compactlm_nemo.workflow.runner import run_stages
from compactlm_nemo.workflow.stage_table import stages_of

SHARED = ("teacher", "tokens", "score", "search")
"""Artifacts that all candidates have in common."""


FOLDER = "rank"


RANKING = "ranking.json"


def candidate_config(config: Config, index: int, stop_after: int | None = None) -> Config:
    """Return the run of one candidate; it trains `stop_after` of its steps."""
    steps = config.rank.steps
    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir) / FOLDER / str(index))),
        rank=RankConfig(),
        wandb=config.wandb.part(config.run.dir, f"rank-{index}", job_type="rank"),
        prune=replace(config.prune, candidate=index),
        correct=config.correct.at_most(steps),
        distill=replace(
            config.distill,
            steps=steps,
            warmup_steps=min(config.distill.warmup_steps, steps - 1),
            stop_after=None if stop_after == steps else stop_after,
        ),
    )


def rank(config: Config) -> None:
    """Train the candidates that are asked for and, when all are trained, write the ranking."""
    if config.rank.candidates == 0:
        raise ConfigError("rank.candidates=0 trains no candidate; set it, for example rank.candidates=4.")
    if config.dry_run:
        return run_stages(config, only="prune")
    if config.rank.only is None:  # the tasks of an array would get in each other's way
        for stage in stages_of(config, "search"):
            run_stages(config, only=stage)
    candidates = json.loads((Path(config.run.dir) / "search" / "candidates.json").read_text())
    alive = list(range(min(config.rank.candidates, len(candidates))))
    if config.rank.only is not None:
        if config.rank.only in alive:
            _train(config, config.rank.only, config.rank.steps)
        return None
    for steps in config.rank.rounds():
        for index in alive:
            _train(config, index, steps)
        if steps < config.rank.steps:
            alive = sorted(alive, key=lambda i: _round_loss(config, i, steps))[: -(-len(alive) // 2)]
    _write_ranking(config, candidates, alive)
    return None


def _train(config: Config, index: int, steps: int) -> None:
    """Prune a candidate, and train it up to these steps."""
    candidate_settings = candidate_config(config, index, steps)
    folder = Path(candidate_settings.run.dir)
    if is_main_rank():
        folder.mkdir(parents=True, exist_ok=True)
        shared = [*SHARED, *([COMMITS] if (Path(config.run.dir) / COMMITS).exists() else [])]
        for artifact in shared:
            if not (folder / artifact).exists():
                (folder / artifact).symlink_to(os.path.relpath(Path(config.run.dir) / artifact, folder))
    _meet(config)
    run_stages(candidate_settings, only="prune")
    run_stages(candidate_settings, only="distill")
    if steps == config.rank.steps and config.rank.tasks:
        run_stages(candidate_settings, only="evaluate")


def _meet(config: Config) -> None:
    """Wait until the main rank has made the links."""
    if launch_world_size() > 1:
        from compactlm_nemo.parallel.launch import launched

        with launched(config.parallel, config.run.seed):
            pass


def _metrics(config: Config, index: int) -> list[dict[str, Any]]:
    """Return the lines of a candidate's training so far."""
    folder = Path(candidate_config(config, index).run.dir)
    parts = (folder / "distill", folder / "progress" / "distill")
    path = next(part / METRICS for part in parts if (part / METRICS).is_file())
    return [json.loads(line) for line in path.read_text().splitlines()]


def _round_loss(config: Config, index: int, steps: int) -> float:
    """Return mean distillation loss over the last tenth of the steps before `steps`: of the same batches for all."""
    first = steps - max(1, steps // 10)
    losses = [line[TRAINED_LOSS] for line in _metrics(config, index) if first <= line["step"] < steps]
    finite = [loss for loss in losses if loss is not None]  # a step that was skipped has none
    return sum(finite) / len(finite) if finite else math.inf


def _accuracy(found: Mapping[str, Measured], name: str) -> Measured:
    """Return the accuracy on a file of questions, or on a task of lm-eval.

    Raises:
        ConfigError: a task has none.
    """
    names = [f"choices/{name}", *(f"task/{name}/{metric}" for metric in ACCURACIES)]
    known = [found[each] for each in names if each in found]
    if not known:
        raise ConfigError(f"rank.by has {name}, a task without an accuracy ({', '.join(ACCURACIES)}); choose another.")
    return known[0]


def _write_ranking(config: Config, found: list[dict[str, Any]], trained: list[int]) -> None:
    """Write `ranking.json`: the candidates that were trained to the end with their loss, best first."""
    if not is_main_rank():
        return
    folder = Path(config.run.dir) / FOLDER
    entries = [found[i] | {"candidate": i} | _measured(folder / str(i), config.rank) for i in trained]
    write_json(folder / RANKING, sorted(entries, key=lambda entry: entry.get("score", entry["loss"])))


def _measured(run: Path, cfg: RankConfig) -> dict[str, Any]:
    """Return what decides over a candidate: its loss and, with tasks, what the tasks give it before and after training.

    ``score = weight of loss x loss - sum over tasks of weight x accuracy``.
    """
    trained = read_manifest(run / "distill")["results"]
    if not cfg.tasks:
        return {"loss": trained["loss"]}
    found = measured(run, ["evaluate"])
    tasks = {
        name: {model: _accuracy(found, name).models[model].value for model in (PRUNED, DISTILLED)} for name in cfg.tasks
    }
    accuracy = sum(cfg.by[name] * values[DISTILLED] for name, values in tasks.items())
    return {
        "loss": trained["loss"],
        "loss_before": read_manifest(run / "student")["results"]["loss_after"],
        "tasks": tasks,
        "score": cfg.by.get(LOSS, 0.0) * trained["loss"] - accuracy,
    }
