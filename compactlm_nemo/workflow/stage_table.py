"""All stages in order: the chain, the checks, the plan and the manual read this table."""

from __future__ import annotations

from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.stages import (
    cache_teacher,
    correct_teacher,
    distill,
    evaluate,
    export,
    generate,
    import_model,
    profile,
    prune,
    push,
    report,
    score,
    search,
    tokenize,
)
from compactlm_nemo.stages.stage import Stage

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        import_model.STAGE,
        generate.STAGE,
        tokenize.STAGE,
        score.STAGE,
        search.STAGE,
        prune.STAGE,
        correct_teacher.STAGE,
        cache_teacher.STAGE,
        distill.STAGE,
        evaluate.STAGE,
        export.STAGE,
        profile.STAGE,
        push.STAGE,
        report.STAGE,
    )
}
MAKERS: dict[str, Stage] = {stage.writes: stage for stage in STAGES.values()}
"""Artifact -> the stage that makes it."""


def stages_of(config: Config, until: str | None = None) -> list[str]:
    """Return the stages of a whole run in order, or of its part up to one.

    Raises:
        ConfigError: a run with these settings has no stage `until`.
    """
    names = [stage.name for stage in STAGES.values() if stage.is_wanted(config)]
    if until is None:
        return names
    if until not in names:
        raise ConfigError(f"this run has no stage {until}; name one of {', '.join(names)}.")
    return names[: names.index(until) + 1]
