"""Iterative pruning: T rounds of score and prune, each a part of the way, with or without distillation between.

Round t of T is a run of its own in `run.dir/round_{t}` whose teacher is the student of round t - 1 (the original in
the first) and whose student has, on every axis, the size ``d_s - t (d_s - d_t) / T`` between teacher d_s and target
d_t. The last round is the run itself, with all its stages. Done stages are skipped, so a killed recipe goes on.

Source: Minitron (arXiv 2407.14679), section 2.2, which found one round as good for importance alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from compactlm_nemo.config.export import ExportConfig, ExportDtype, ExportedModel
from compactlm_nemo.config.model import ModelConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.errors import ConfigError, listed
from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.space import enumerate_space
from compactlm_nemo.workflow.preflight import planned_search, ready
from compactlm_nemo.workflow.runner import run_stages


def size_between(teacher: Dims, target: Dims, share: float, tp: int = 1) -> Dims:
    """Return the sizes `share` of the way from teacher to target; what tensor parallelism splits stays divisible."""

    def between(axis: str) -> int:
        start, end = teacher.shape()[axis], target.shape()[axis]
        unit = tp if AXES[axis].split_by_tp else teacher.expert_groups if axis == "experts" else 1
        return start if start == end else round((start + (end - start) * share) / unit) * unit

    sizes = {axis: between(axis) for axis in AXES}
    per_group = [dims.num_heads // dims.num_query_groups for dims in (teacher, target)]
    sizes["heads"] = sizes["groups"] * round(per_group[0] + (per_group[1] - per_group[0]) * share)
    if teacher.shared_expert_ffn and teacher.dense_layers is not None:  # counted in experts: `models.limits`
        wide = [dims.shared_expert_ffn // dims.ffn_hidden_size for dims in (teacher, target)]
        sizes["shared_expert_ffn"] = sizes["ffn"] * round(wide[0] + (wide[1] - wide[0]) * share)
    return teacher.with_shape(**sizes)


def round_config(config: Config, number: int, student: Dims, source: str) -> Config:
    """Return the run of one round: one candidate, from the model in `source`."""
    axes: dict[str, Any] = {axis: [size] for axis, size in student.shape().items()}
    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir) / f"round_{number}")),
        model=_from(config, source),
        wandb=config.wandb.part(config.run.dir, f"round-{number}", job_type="round"),
        search=replace(
            SearchConfig(**axes),
            width=config.search.width,
            depth=config.search.depth,
            experts_by=config.search.experts_by,
        ),
        correct=config.correct.at_most(max(1, config.rounds.steps)),
        export=ExportConfig(
            of=ExportedModel.distilled if config.rounds.steps else ExportedModel.student,
            dtype=ExportDtype(config.model.precision.value),  # the next round's teacher loses nothing
        ),
        distill=replace(
            config.distill,
            steps=max(1, config.rounds.steps),
            warmup_steps=min(config.distill.warmup_steps, max(0, config.rounds.steps - 1)),
        ),
    )


def _from(config: Config, source: str) -> ModelConfig:
    """Return the settings of a round's teacher: the given one, or the student of the round before."""
    if source == config.model.source:
        return config.model
    return replace(config.model, source=source, revision=None, hf_assets=None, architecture={})


def _token_problems(config: Config) -> list[str]:
    """Return which token files a later round would misread: their ids are of the vocabulary that the first trims."""
    if config.model.vocab_texts is None or config.rounds.count == 1:
        return []
    return [
        f"data.{name}={corpus.path} has ids of the whole vocabulary, and later rounds have a trimmed teacher; "
        "give the text itself, or leave model.vocab_texts out."
        for name, corpus in config.data.corpora().items()
        if corpus.is_tokenised
    ]


def run_rounds(config: Config) -> None:
    """Run all rounds, the last with every stage."""
    config, teacher = ready(config)
    if config.data.has_generated and config.rounds.count > 1:
        raise ConfigError(
            f"data.train has a generated text, which with rounds.count={config.rounds.count} each round's teacher "
            "would write; give the documents.jsonl of another run as a path."
        )
    if problems := _token_problems(config):
        raise ConfigError(listed(problems))
    if config.dry_run:
        return run_stages(config)
    if config.search.latency_profile is not None and config.rounds.count > 1:
        raise ConfigError(
            f"search.latency_profile={config.search.latency_profile} is of one teacher, and rounds.count="
            f"{config.rounds.count} has one a round; leave one of them out."
        )
    assert teacher is not None  # outside a dry run it was opened
    candidates = enumerate_space(teacher, planned_search(config), config.parallel.tp)
    if len(candidates) > 1:
        raise ConfigError(f"recipes.rounds needs one target, search allows {len(candidates)}; give one value an axis.")
    source = config.model.source
    for number in range(1, config.rounds.count):
        shape = size_between(teacher, candidates[0], number / config.rounds.count, config.parallel.tp)
        round_settings = round_config(config, number, shape, source)
        for stage in ("import_model", "tokenize", "score", "search", "prune"):
            run_stages(round_settings, only=stage)
        if config.rounds.steps:
            run_stages(round_settings, only="distill")
        run_stages(round_settings, only="export")
        source = str(Path(round_settings.run.dir) / "export" / "hf")
    run_stages(replace(config, model=_from(config, source)))
    return None
