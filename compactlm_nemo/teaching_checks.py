"""Rules between the settings of distillation and its teacher; `checks` reports them with all others."""

from __future__ import annotations

from compactlm_nemo.config.choices import StoredKind, Stream, TeacherSource
from compactlm_nemo.config.schema import Config
from compactlm_nemo.distill.hidden import pairs_of
from compactlm_nemo.distill.losses import weighted_losses
from compactlm_nemo.errors import CompactLMError, ConfigError
from compactlm_nemo.models.dims import Dims, split_layers


def teaching_problems(config: Config, dims: Dims | None) -> list[str]:
    """Every broken rule; `dims` is the teacher's architecture where it is known."""
    return [
        *_stored_problems(config, dims),
        *_teacher_layout_problems(config, dims),
        *_hidden_loss_problems(config),
        *_beside_problems(config),
    ]


def _stored_problems(config: Config, dims: Dims | None) -> list[str]:
    """What a stored teacher, or none, cannot do."""
    cfg, cache = config.distill, config.cache
    problems = []
    if dims is not None and cache.kind is StoredKind.top_k and cache.k > dims.vocab_size:
        problems.append(f"cache.k={cache.k} must be <= the vocabulary of {dims.vocab_size}; the paper says > 100.")
    if cfg.teacher is TeacherSource.none:
        return problems + [
            f"distill.loss.{name} needs a teacher; set distill.teacher=live, or {name}=0 and cross_entropy=1."
            for name in weighted_losses(cfg.loss)
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
            for name in weighted_losses(cfg.loss)
            if name != "forward_kl"
        ]
    return problems


def _teacher_layout_problems(config: Config, dims: Dims | None) -> list[str]:
    """What is wrong with a teacher on a mesh of its own."""
    layout, student, cfg = config.teacher_parallel, config.parallel, config.distill
    if layout == student:
        return []
    given = f"distill.teacher_tp={cfg.teacher_tp} and distill.teacher_pp={cfg.teacher_pp}"
    problems = []
    if cfg.teacher is not TeacherSource.live:
        problems.append(f"{given} are of a live teacher; leave them out with distill.teacher={cfg.teacher.name}.")
    if student.cp > 1 or student.ep > 1:
        problems.append(
            f"{given} need parallel.cp=1 and parallel.ep=1, not {student.cp} and {student.ep}; leave them out."
        )
    if dims is None:
        return problems
    problems += [
        f"distill.teacher_tp={layout.tp} must divide the teacher's {size}; use a divisor."
        for size in undivided([dims], layout.tp)
    ]
    try:
        split_layers(dims.num_layers, layout)
    except CompactLMError as error:
        problems.append(f"distill.teacher_pp={layout.pp}: {error}")
    return problems


def _hidden_loss_problems(config: Config) -> list[str]:
    """What losses between hidden states ask of the teacher and of the other losses."""
    cfg = config.distill
    if not cfg.hidden.is_on:
        return []
    problems = _live_beside_problems(config, "distill.hidden")
    if config.prune.hidden is Stream.rotate:
        problems.append(
            "distill.hidden with prune.hidden=rotate: the student's channels are not the teacher's any more; set "
            "prune.hidden=select."
        )
    if cfg.hidden.weight is None and not weighted_losses(cfg.loss):
        problems.append("distill.hidden.weight=null balances with a logit loss, and there is none; give a weight.")
    return problems


def _beside_problems(config: Config) -> list[str]:
    """What a teacher that is trained while it teaches asks for."""
    correct, cfg = config.correct, config.distill
    if not correct.beside:
        return []
    problems = _live_beside_problems(config, "correct.beside=true")
    if not 0 < correct.steps <= cfg.steps:
        problems.append(
            f"correct.beside=true needs correct.steps={correct.steps} in [1, distill.steps={cfg.steps}]; change either."
        )
    return problems


def _live_beside_problems(config: Config, setting: str) -> list[str]:
    """What a setting asks for that hooks into the teacher or trains it."""
    cfg = config.distill
    if cfg.teacher is TeacherSource.live and config.teacher_parallel == config.parallel:
        return []
    return [
        f"{setting} needs a live teacher in the student's layout, not distill.teacher={cfg.teacher.name} with "
        f"distill.teacher_tp={cfg.teacher_tp} and distill.teacher_pp={cfg.teacher_pp}; change either."
    ]


def map_problem(config: Config, teacher: Dims, student: Dims) -> str:
    """What is wrong with the pairs of `distill.hidden` for these two models; empty when nothing is."""
    try:
        pairs_of(config.distill.hidden, teacher, student)
    except ConfigError as error:
        return str(error)
    return ""


def undivided(models: list[Dims], tp: int) -> list[str]:
    """What tensor parallelism splits and `tp` does not divide, each with its size."""
    sizes = {
        "query groups": {model.num_query_groups for model in models},
        "heads": {model.num_heads for model in models},
        "MLP width": {model.ffn_hidden_size for model in models},
        "shared expert's width": {model.shared_expert_ffn for model in models},
    }
    return [f"{name} {size}" for name, values in sizes.items() for size in sorted(values) if size % tp]
