"""All stages in order."""

from __future__ import annotations

from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import TeacherSource
from compactlm_nemo.stages.import_model import _source
from compactlm_nemo.stages.prune import _ranking
from compactlm_nemo.stages.search import _how_to_cut, _split
from compactlm_nemo.stages.stage import Stage
from compactlm_nemo.stages.tokenize import _corpora

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("import", "teacher", (), lambda c: {"model.precision": c.model.precision}, _source),
        Stage("tokenize", "tokens", ("import",), lambda c: {"corpora": sorted(c.data.corpora())}, _corpora),
        Stage(
            "score",
            "score",
            ("import", "tokenize"),
            lambda c: {"score": result_settings(c.score)} | c.training_text,
        ),
        Stage("search", "search", ("score",), lambda c: {"search": c.search, "prune": _how_to_cut(c)} | _split(c)),
        Stage("prune", "student", ("search",), lambda c: {"prune": c.prune}, _ranking),
        Stage(
            "correct_teacher",
            "corrected",
            ("import", "tokenize"),
            lambda c: {"correct": result_settings(c.correction)} | c.training_text,
        ),
        Stage(
            "cache_teacher",
            "targets",
            ("import", "tokenize"),
            lambda c: {"cache": result_settings(c.cache), "samples": c.cached_samples} | c.training_text,
        ),
        Stage(
            "distill",
            "distill",
            ("prune",),
            lambda c: {"distill": result_settings(c.distill)} | c.samples_settings | c.correcting,
        ),
        Stage("evaluate", "evaluate", ("distill",), lambda c: {"evaluate": result_settings(c.evaluate)}),
        Stage("export", "export", ("distill",), lambda c: {}),
        Stage("report", "report", ("evaluate", "export"), lambda c: {}),
    )
}


def _needs(stage: Stage, config: Config) -> tuple[str, ...]:
    """Stages whose results this one reads."""
    needs = stage.needs
    if stage.name == "distill" and config.distill.teacher is TeacherSource.stored:
        needs = (*needs, "cache_teacher")
    if stage.name in ("distill", "cache_teacher") and config.corrects_before:
        needs = (*needs, "correct_teacher")
    return needs


def stages_of(config: Config) -> list[str]:
    """The stages of a whole run, in order."""
    wanted = {
        "cache_teacher": config.distill.teacher is TeacherSource.stored,
        "correct_teacher": config.corrects_before,
    }
    return [name for name in STAGES if wanted.get(name, True)]
