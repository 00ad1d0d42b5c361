"""The distill stage: teacher, student and tokens become a trained student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.artifacts import MANIFEST, read_manifest
from compactlm_nemo.config.distill import Recompute, Result
from compactlm_nemo.config.fingerprint import correction_settings, heldout_loss, result_settings, training_text
from compactlm_nemo.config.hardware import can_compile
from compactlm_nemo.config.prune import Stream
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import StoredKind, TeacherSource
from compactlm_nemo.distill.layer_pairs import layer_pairs
from compactlm_nemo.errors import CompactLMError, ConfigError
from compactlm_nemo.models.dims import MODEL, Dims
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def distill_settings(config: Config) -> dict[str, Any]:
    """Return what decides the student's weights."""
    chosen_by = heldout_loss(config) if config.distill.result is Result.best else {}
    training = {"distill": result_settings(config.distill)} | training_text(config)
    return training | correction_settings(config) | chosen_by


def distill_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return the broken rules between the training, its losses and its teacher."""
    cfg, problems = config.distill, []
    if cfg.global_batch % cfg.micro_batch:
        problems.append(f"distill.micro_batch={cfg.micro_batch} must divide distill.global_batch={cfg.global_batch}.")
    if config.model.compile and cfg.hidden.is_on:
        problems.append(
            "model.compile=true compiles the layers that distill.hidden looks into; leave out either of them."
        )
    if cfg.hidden.is_on and cfg.recompute is Recompute.selective:
        problems.append(
            "distill.recompute=selective runs parts of a layer anew, which the losses of distill.hidden cannot follow; "
            "use full or none."
        )
    if config.model.compile and not config.dry_run and not can_compile():
        problems.append(
            "model.compile=true needs a C compiler (cc, gcc or clang) and TORCH_COMPILE_DISABLE unset; set it to false."
        )
    problems += _start_problems(config, models[1:])
    return problems + _stored_problems(config) + _hidden_loss_problems(config, models) + _correction_problems(config)


def start_files(config: Config) -> dict[str, Path]:
    """Return what says which student trains on."""
    start = config.distill.start_from
    return {} if start is None else {"distill.start_from": Path(start) / MANIFEST}


def _start_problems(config: Config, students: list[Dims]) -> list[str]:
    """Return what keeps the student of a finished training from training on here."""
    start = config.distill.start_from
    if start is None:
        return []
    problems, named, run = [], f"distill.start_from={start}", Path(config.run.dir)
    if run.resolve() == Path(start).resolve().parent:
        problems.append(f"{named} is of this run itself; give another run.dir, with run.reuse={run}.")
    if config.distill.teacher is TeacherSource.stored:
        problems.append(f"{named} goes on with samples whose targets are not stored; set distill.teacher=live.")
    try:
        is_training = read_manifest(Path(start))["stage"] == STAGE.writes
        dims = Dims.load(Path(start) / MODEL) if is_training else None
    except (CompactLMError, OSError, ValueError, TypeError) as error:
        return [*problems, f"{named} holds no finished training ({error}); name the folder distill of a finished run."]
    if dims is None:
        problems.append(f"{named} holds another stage; name the folder distill of a finished run.")
    elif students and dims not in students:
        problems.append(f"{named} has a student of another shape than this run's; give this run the shape of that one.")
    return problems


def _stored_problems(config: Config) -> list[str]:
    """Return what a stored teacher, or none, cannot do."""
    cfg, cache = config.distill, config.cache
    problems: list[str] = []
    if cfg.teacher is TeacherSource.none:
        return [
            f"distill.loss.{name} needs a teacher; set distill.teacher=live, or {name}=0 and cross_entropy=1."
            for name in cfg.loss.against_teacher
        ]
    if cfg.teacher is TeacherSource.live:
        return problems
    if config.cached_samples < cfg.num_samples:
        problems.append(
            f"cache.samples={cache.samples} is less than the {cfg.num_samples} samples of distill.steps x "
            "distill.global_batch; raise it, or leave it out."
        )
    if cache.kind is StoredKind.top_k:
        if cfg.temperature != 1:
            problems.append(f"distill.temperature={cfg.temperature} needs cache.kind=hidden; top_k is stored at 1.")
        problems += [
            f"distill.loss.{name} needs cache.kind=hidden or a live teacher; top_k serves forward_kl and cross_entropy."
            for name in cfg.loss.against_teacher
            if name != "forward_kl"
        ]
    return problems


def _hidden_loss_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return what losses between hidden states ask of the teacher, the student and the other losses."""
    cfg = config.distill
    if not cfg.hidden.is_on:
        return []
    problems = _live_teacher_problems(config, "distill.hidden")
    if config.prune.hidden is Stream.rotate:
        problems.append(
            "distill.hidden with prune.hidden=rotate: the student's channels are not the teacher's any more; set "
            "prune.hidden=select."
        )
    if cfg.hidden.weight is None and not cfg.loss.against_teacher:
        problems.append("distill.hidden.weight=null balances with a logit loss, and there is none; give a weight.")
    unmapped = {_map_problem(config, models[0], student) for student in models[1:]}
    return problems + sorted(unmapped - {""})


def _correction_problems(config: Config) -> list[str]:
    """Return what a teacher that is trained while it teaches asks for."""
    correct, cfg = config.correct, config.distill
    if not correct.while_distilling:
        return []
    problems = _live_teacher_problems(config, "correct.while_distilling=true")
    if not 0 < correct.steps <= cfg.steps:
        problems.append(
            f"correct.while_distilling=true needs correct.steps={correct.steps} in [1, distill.steps={cfg.steps}]; "
            "change either."
        )
    return problems


def _live_teacher_problems(config: Config, setting: str) -> list[str]:
    """Return what a setting asks for that hooks into the teacher or trains it."""
    cfg = config.distill
    if cfg.teacher is TeacherSource.live and config.teacher_parallel == config.parallel:
        return []
    return [
        f"{setting} needs a live teacher in the student's layout, not distill.teacher={cfg.teacher.name} with "
        f"distill.teacher_tp={cfg.teacher_tp} and distill.teacher_pp={cfg.teacher_pp}; change either."
    ]


def _map_problem(config: Config, teacher: Dims, student: Dims) -> str:
    """Return what is wrong with the pairs of `distill.hidden` for these two models; empty when nothing is."""
    try:
        layer_pairs(config.distill.hidden, teacher, student)
    except ConfigError as error:
        return str(error)
    return ""


def distill(run: Run, folder: Path) -> dict[str, Any] | None:
    """Train the student; None when `distill.stop_after` ends that earlier."""
    from compactlm_nemo.stages.training_run import train

    return train(run, folder, run.config.distill, source="student")


STAGE = Stage(
    name="distill",
    summary="teacher, student and tokens -> trained student",
    reads=("teacher", "tokens", "student"),
    may_read={
        "corrected": lambda config: config.corrects_before,
        "targets": lambda config: config.distill.teacher is TeacherSource.stored,
    },
    writes="distill",
    settings=distill_settings,
    files=start_files,
    problems=distill_problems,
    run=distill,
)
