"""The prune stage: teacher, scores and one candidate become a student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.config.prune import Blocks, HeadCut, Reconstruct, Stream
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.limits import cut_problem
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.models.build import ModelChunks
    from compactlm_nemo.pruning.plan import Plan
    from compactlm_nemo.stages.context import Run
    from compactlm_nemo.stages.pruner import Pruner


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
    import shutil

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
    trained = _distill_blocks(run, pruner, model, plan) if run.config.prune.blocks is Blocks.distill else {}
    run.save(folder, model, if_not_finite="raise prune.ridge, or measure the second moments on more score.samples")
    with main_rank_writes() as writes:
        if writes:
            shutil.rmtree(run.progress, ignore_errors=True)
            atomic_write_text(folder / PLAN, json.dumps(plan.to_json()) + "\n")
    return {
        "params": num_params(plan.student(teacher, student)),
        "teacher_params": num_params(teacher),
        "shape": candidates[chosen],
        "loss_before": before,
        "loss_after": validation_loss(run, model, "student"),
    } | trained


def _distill_blocks(run: Run, pruner: Pruner, model: ModelChunks, plan: Plan) -> dict[str, Any]:
    """Train each layer of the student by itself, in parts that outlive a kill; return the losses of the layers."""
    from compactlm_nemo.artifacts import settings_of
    from compactlm_nemo.stages.kept_layers import KeptLayers
    from compactlm_nemo.stages.score_pass import tokens_hash

    config, windows_NS = run.config, pruner.block_windows()
    folder = run.open_progress(
        settings_of(
            {
                "prune": result_settings(config.prune),
                "parallel": config.parallel,
                "plan": plan.to_json(),
                "score.micro_batch": config.score.micro_batch,
                "model.precision": config.model.precision,
                "windows": tokens_hash(windows_NS),
            }
            | {f"fingerprint.{artifact}": run.fingerprint(artifact) for artifact in ("teacher", "score")}
        ),
        are_independent=True,
    )
    store = KeptLayers(folder, model.dims.num_layers, run.mesh)
    losses = pruner.distill_blocks(model, plan, windows_NS, store)
    return {"block_losses": [{"before": before, "after": after} for _, (before, after) in sorted(losses.items())]}


def prune_plan(config: Config) -> list[str]:
    """Return a line of a dry run about the training of single layers, where that is asked for."""
    prune = config.prune
    if prune.blocks is Blocks.none:
        return []
    windows = prune.block_samples or config.score.samples
    tokens = windows * config.data.sequence_length * prune.block_passes
    return [
        f"  each layer is trained by itself on the {prune.block_inputs.name}'s stream: {windows} windows x "
        f"{prune.block_passes} passes = {tokens:,} tokens a layer"
    ]


STAGE = Stage(
    name="prune",
    summary="teacher, scores and one candidate -> student checkpoint, `plan.json` with the kept indices",
    reads=("teacher", "tokens", "score", "search"),
    writes="student",
    settings=lambda config: {"prune": result_settings(config.prune)},
    files=ranking_file,
    problems=prune_problems,
    plan=prune_plan,
    run=prune,
)
