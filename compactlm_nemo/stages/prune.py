"""The prune stage: teacher, scores and one candidate become a student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.config.prune import HeadCut, Reconstruct, Stream
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.limits import cut_problem
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def ranking_file(config: Config) -> dict[str, Path]:
    """Return the ranking that short distillations made of the candidates, where that decides."""
    return {"ranking": Path(config.run.dir) / "rank" / "ranking.json"} if config.rank.candidates else {}


def prune_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return what the way of cutting needs of the scores and of the teacher's norms."""
    prune, problems = config.prune, []
    if prune.reconstruct is not Reconstruct.none and not config.score.second_moments:
        problems.append(
            f"prune.reconstruct={prune.reconstruct.name} needs score.second_moments=true; set it, or reconstruct=none."
        )
    if not models:
        return problems
    teacher = models[0]
    problems += sorted({problem for model in models[1:] if (problem := cut_problem(teacher, model))})[:1]
    if teacher.norm_after:
        problems += [
            f"{setting} needs attention and MLP without norms behind them, which {teacher.family} has; {out}."
            for setting, is_set, out in (
                ("prune.hidden=rotate", prune.hidden is Stream.rotate, "use select"),
                ("prune.sequential=true", prune.sequential, "leave it out"),
            )
            if is_set
        ]
    if teacher.kv_lora_rank:
        problems += [
            f"{setting} needs {need}, and {teacher.family} makes them from latents; {out}."
            for setting, is_set, need, out in (
                (
                    "prune.sequential=true",
                    prune.sequential,
                    "one projection of queries, keys and values",
                    "leave it out",
                ),
                ("prune.heads=merge", prune.heads is HeadCut.merge, "heads that share keys and values", "use cut"),
            )
            if is_set
        ]
    if prune.hidden is Stream.rotate and teacher.layer_norm_1p:
        problems.append(
            f"prune.hidden=rotate needs RMSNorms, {teacher.family} has LayerNorms, which see a rotation; use select."
        )
    return problems


def prune(run: Run, folder: Path) -> dict[str, Any]:
    """Cut the teacher to one candidate's sizes, and measure what that costs before any training."""
    import json

    from compactlm_nemo.artifacts import atomic_write_text
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.pruning.plan import PLAN
    from compactlm_nemo.search.candidates import Candidate
    from compactlm_nemo.search.cost import num_params
    from compactlm_nemo.stages.context import validation_loss
    from compactlm_nemo.stages.pruner import Pruner

    [ranked] = ranking_file(run.config).values() or [run.path("search") / "candidates.json"]
    candidates = json.loads(ranked.read_text())
    chosen = run.config.prune.candidate
    if not 0 <= chosen < len(candidates):
        raise ConfigError(f"prune.candidate={chosen} must be in [0, {len(candidates)}), the number of candidates.")
    pruner = Pruner(run)
    teacher, student = pruner.teacher, Candidate(**candidates[chosen]).dims(pruner.teacher)
    plan = pruner.plan(student, run.path("search"))
    before = validation_loss(run, run.load("teacher"), "teacher")
    model = pruner.student(student, plan)
    run.save(folder, model, if_not_finite="raise prune.ridge, or measure the second moments on more score.samples")
    with main_rank_writes() as writes:
        if writes:
            atomic_write_text(folder / PLAN, json.dumps(plan.to_json()) + "\n")
    return {
        "params": num_params(plan.student(teacher, student)),
        "teacher_params": num_params(teacher),
        "shape": candidates[chosen],
        "loss_before": before,
        "loss_after": validation_loss(run, model, "student"),
    }


STAGE = Stage(
    name="prune",
    summary="teacher, scores and one candidate -> student checkpoint, `plan.json` with the kept indices",
    reads=("teacher", "tokens", "score", "search"),
    writes="student",
    settings=lambda config: {"prune": result_settings(config.prune)},
    files=ranking_file,
    problems=prune_problems,
    run=prune,
)
