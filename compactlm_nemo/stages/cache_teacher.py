"""The cache_teacher stage: the teacher's targets of every sample of the training order are stored on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.fingerprint import result_settings, training_text
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import StoredKind, TeacherSource
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def cache_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return whether more tokens are to be stored than the vocabulary has."""
    cache = config.cache
    if not models or cache.kind is not StoredKind.top_k or cache.k <= models[0].vocab_size:
        return []
    return [f"cache.k={cache.k} must be <= the vocabulary of {models[0].vocab_size}; the paper says > 100."]


def cache_teacher(run: Run, folder: Path) -> dict[str, Any]:
    """Store the targets."""
    if problems := cache_problems(run.config, [run.dims("teacher")]):  # a trimmed vocabulary is known only now
        raise ConfigError(problems[0])
    from compactlm_nemo.stages.teacher_targets import store_targets

    return store_targets(run, folder)


STAGE = Stage(
    name="cache_teacher",
    summary="teacher and tokens -> shards of stored targets, for a distillation without a teacher in memory",
    reads=("teacher", "tokens"),
    may_read={"corrected": lambda config: config.corrects_before},
    writes="targets",
    settings=lambda config: (
        {"cache": result_settings(config.cache), "samples": config.cached_samples} | training_text(config)
    ),
    is_wanted=lambda config: config.distill.teacher is TeacherSource.stored,
    problems=cache_problems,
    run=cache_teacher,
)
