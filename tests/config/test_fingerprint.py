"""Every setting says whether it decides a result; another value voids exactly the stages that read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from typing import Any

import pytest

from compactlm_nemo.artifacts import settings_of
from compactlm_nemo.config.cluster import SHARES
from compactlm_nemo.config.data import CorpusConfig, DataConfig
from compactlm_nemo.config.distill import DistillConfig, Result
from compactlm_nemo.config.evaluate import ContinuationsConfig, EvaluateConfig
from compactlm_nemo.config.export import ExportConfig, ExportDtype, ExportFormat
from compactlm_nemo.config.fingerprint import MARK
from compactlm_nemo.config.gate import LimitConfig
from compactlm_nemo.config.loss import HiddenConfig
from compactlm_nemo.config.model import ModelConfig
from compactlm_nemo.config.plan import BENEFIT, PlanConfig
from compactlm_nemo.config.profile import Engine, Phase, ProfileConfig
from compactlm_nemo.config.prune import BLOCK_SETTINGS, Blocks, ErrorAxis, PruneConfig, Reconstruct
from compactlm_nemo.config.run import RunConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.score import DepthMetric, ScoreConfig, WidthMetric
from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.config.teacher import CorrectConfig, TeacherSource
from compactlm_nemo.workflow.stage_table import STAGES, stages_of

CONFIG = Config(
    run=RunConfig(dir="runs/a"),
    model=ModelConfig(source="teacher"),
    data=DataConfig(train={"a": "a.jsonl", "own": {"generated": True}}, heldout={"b": "b.jsonl"}),
    score=ScoreConfig(depth=[DepthMetric.bi, DepthMetric.lm_loss_blocks], block_lengths=[2], second_moments=True),
    prune=PruneConfig(reconstruct=Reconstruct.least_squares, blocks=Blocks.distill),
    correct=CorrectConfig(steps=40, warmup_steps=2),
    distill=DistillConfig(teacher=TeacherSource.stored, hidden=HiddenConfig(embedding=True)),
    evaluate=EvaluateConfig(tasks=["a"], continuations=ContinuationsConfig(prompts=1)),
    export=ExportConfig(push="a/b"),
    profile=ProfileConfig(engines=[Engine.llama_cpp]),
)
"""A run with every stage."""
TEXT = {"score", "correct_teacher", "cache_teacher", "distill"}
"""Stages that draw samples from the training text."""
READ_BY = {
    "run": set(), "run.seed": TEXT | {"evaluate", "generate"},
    "model": set(), "model.precision": {"import_model"}, "model.vocab_texts": {"import_model"},
    "parallel": set(),
    "data": TEXT, "data.bos": TEXT | {"generate"},
    "data.train": TEXT | {"tokenize"}, "data.heldout": {"tokenize", "profile"},
    "data.chat_template": set(),  # its content decides, as that of every file
    "data.special_tokens": {"tokenize"}, "data.document_end": {"tokenize", "evaluate", "generate"},
    "data.mask_documents": TEXT | {"tokenize"},
    "generate": {"generate"}, "generate.batch": set(),
    "score": {"score"}, "score.micro_batch": set(),
    "search": {"search"}, "search.latency_profile": set(),  # its content decides
    "prune": {"search", "prune"}, "prune.candidate": {"prune"},
    "prune.blocks": {"prune"}, **{f"prune.{name}": {"prune"} for name in BLOCK_SETTINGS},
    "rank": set(), "rounds": set(),
    "correct": {"correct_teacher"},
    "cache": {"cache_teacher"}, "cache.shard_samples": set(), "cache.micro_batch": set(),
    # The teacher's own training takes from `distill` what `correct` does not have.
    "distill": {"distill", "correct_teacher"},
    "distill.steps": {"distill", "cache_teacher"},
    "distill.start_from": set(),  # what the folder holds decides, as an input
    "distill.global_batch": {"distill", "correct_teacher", "cache_teacher"},
    **{f"distill.{name}": {"distill"} for name in ("teacher", "loss", "hidden", "lr", "min_lr", "warmup_steps")},
    **{
        f"distill.{name}": set()
        for name in (
            "teacher_tp", "teacher_pp", "stop_after", "micro_batch", "loss_memory_mib", "recompute", "overlap",
            "checkpoint_every", "checkpoint_minutes", "checkpoint_async", "keep_checkpoints", "log_every", "eval_every",
            "eval_tokens", "peak_tflops",
        )
    },
    "evaluate": {"evaluate"}, "evaluate.micro_batch": set(),
    "evaluate.choices": set(), "evaluate.bias": set(),  # their content decides, as that of every file
    "export": {"export"}, "export.push": {"push"},
    "profile": {"profile"}, "gate": {"report"},
    "wandb": set(), "cluster": set(), "nodes": set(), "plan": set(),
}  # fmt: skip
"""Setting, or section of those that are not listed themselves -> the stages whose result another value changes."""
OTHERS: dict[str, Any] = {
    "run.dir": "runs/b", "model.source": "other", "export.push": "c/d", "export.format": None,
    "model.architecture": {"model_type": "llama"},
    "parallel.pp_split": [1], "parallel.sequence_parallel": None, "parallel.virtual_stages": None,
    "data.train": {"a": CorpusConfig(path="c.jsonl"), "own": CorpusConfig(generated=True)},
    "generate.top_p": 0.5, "score.data": {"own": 1.0},
    "model.vocab_texts": CorpusConfig(path="a.jsonl"), "data.heldout": {"c": CorpusConfig(path="b.jsonl")},
    "score.width": [WidthMetric.taylor], "score.depth": [DepthMetric.lm_loss_blocks], "score.block_lengths": [1],
    "score.depth_samples": 3, "score.stop_tolerance": 0.5,
    "rank.by": {"loss": 2.0},
    "search.multiples": {"hidden": 2}, "search.divisors": ["hidden"], "search.ffn_multiples": [1.5],
    "search.latency_profile": None, "search.latency_phase": None, "search.latency_engine": None,
    "profile.engines": [Engine.transformers, Engine.llama_cpp],
    "search.smallest": 0.4, "search.band": 0.1,
    "prune.heads": None, "prune.reconstruct": Reconstruct.none, "prune.by_error": [ErrorAxis.mlp],
    "prune.block_lr": 0.5,
    "rank.only": None,
    "distill.result": None, "distill.hidden.layers": [[-1, -1]], "distill.hidden.attention": [[-1, -1]],
    "distill.hidden.mlp_input": [[-1, -1]], "distill.loss.forward_kl": 0.5, "distill.min_lr": 1e-8,
    "distill.beta1": 0.5, "distill.beta2": 0.5, "distill.warmup_steps": 3, "distill.loss.skew": 0.3,
    "distill.loss.jsd_beta": 0.3, "wandb.project": "x",
    "evaluate.choices": {"a": "a.jsonl"}, "evaluate.bias": {"a": "a.jsonl"},
    "correct.min_lr": 1e-8, "correct.while_distilling": None,
    **{f"cluster.{name}": 0.1 for name in SHARES}, "plan.margin": 0.2,
    "gate.limits": {"a": LimitConfig(metric="loss/b", at_most=1.0)},
    "plan.benefit": None, **{f"plan.{name}": None for name in BENEFIT},
}  # fmt: skip
"""Another value of a setting that has rules of its own; None where it needs a test of its own below."""


def _settings(section: Any, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            assert MARK in field.metadata, f"{key} has no mark"
            yield from _settings(value, key)
        else:
            yield key, field, value


SETTINGS = {
    key: (field, value)
    for section in dataclasses.fields(CONFIG)
    if section.name not in ("dry_run", "nodes")
    for key, field, value in _settings(getattr(CONFIG, section.name), section.name)
} | {"nodes": (Config.__dataclass_fields__["nodes"], CONFIG.nodes)}


def _other(key: str, value: Any) -> Any:
    """Another value."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, int | float):
        return value + 1
    if value is None:
        kind = SETTINGS[key][0].type
        named = {"str | None": "x", "int | None": 3, "float | None": 3.0, "bool | None": True}
        enums = {"WidthMetric | None": WidthMetric.taylor, "DepthMetric | None": DepthMetric.tasks}
        enums |= {"ExportDtype | None": ExportDtype.bf16}
        return (named | enums)[str(kind)]
    return {"list[int]": [3], "list[str]": ["x"]}[str(SETTINGS[key][0].type)]


def _with(config: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})


def _void(before: Config, after: Config) -> set[str]:
    """Stages of both runs whose settings differ."""
    both = [name for name in stages_of(before) if name in stages_of(after)]
    found = {name: [settings_of(STAGES[name].settings(config)) for config in (before, after)] for name in both}
    return {name for name, (old, new) in found.items() if old != new}


def _readers(key: str) -> set[str]:
    while key not in READ_BY and "." in key:
        key = key.rpartition(".")[0]
    return READ_BY[key]


def test_the_run_has_every_stage() -> None:
    assert stages_of(CONFIG) == list(STAGES)


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_has_a_mark(key: str) -> None:
    assert MARK in SETTINGS[key][0].metadata


def test_what_a_plan_is_asked_voids_nothing() -> None:
    asked = PlanConfig(
        benefit=True, teacher_tokens=1e12, served_tokens_day=1e9, served_prompt=2, served_answer=3, served_batch=4,
        served_days=5.0,
    )  # fmt: skip
    assert all(getattr(asked, name) != getattr(CONFIG.plan, name) for name in ("benefit", *BENEFIT))
    assert _void(CONFIG, dataclasses.replace(CONFIG, plan=asked)) == set()


@pytest.mark.parametrize("key", [key for key in SETTINGS if OTHERS.get(key, "generic") is not None])
def test_another_value_voids_the_stages_that_read_it(key: str) -> None:
    value = SETTINGS[key][1]
    other = _other(key, value)
    assert other != value
    assert _void(CONFIG, _with(CONFIG, key, other)) == _readers(key)


def _distill(**settings: Any) -> Config:
    return replace(CONFIG, distill=replace(CONFIG.distill, **settings))


@pytest.mark.parametrize("setting", [{"eval_every": 7}, {"eval_tokens": 4096}])
def test_how_often_it_is_measured_decides_the_best_weights(setting: dict[str, Any]) -> None:
    """A finished run whose result is its best weights must not be taken for one that measured at other steps."""
    best = _distill(result=Result.best, eval_every=5)
    assert _void(best, replace(best, distill=replace(best.distill, **setting))) == {"distill", "correct_teacher"}
    last = _distill(eval_every=5)
    assert _void(last, replace(last, distill=replace(last.distill, **setting))) == set()


def test_another_format_voids_an_export_that_goes_nowhere() -> None:
    """A push takes one format alone, so the run of all stages has no other."""
    kept = replace(CONFIG, export=ExportConfig())
    assert _void(kept, replace(CONFIG, export=ExportConfig(format=ExportFormat.bridge))) == {"export"}


def test_what_of_a_profile_limits_the_latency_decides() -> None:
    limited = replace(CONFIG, search=SearchConfig(latency_ms=9, latency_profile="p.json"))
    assert _void(limited, _with(limited, "search.latency_profile", "q.json")) == set()
    for key, value in (("search.latency_phase", Phase.decode), ("search.latency_engine", Engine.vllm)):
        assert _void(limited, _with(limited, key, value)) == {"search"}


def test_what_the_result_is_decides() -> None:
    assert "distill" in _void(_distill(eval_every=5), _distill(eval_every=5, result=Result.best))


def test_checkpoints_decide_where_a_spike_goes_back_to() -> None:
    guarded = _distill(spike_factor=3.0)
    changed = replace(guarded, distill=replace(guarded.distill, checkpoint_every=7))
    assert _void(guarded, changed) == {"distill", "correct_teacher"}


def test_tasks_decide_scores_where_layers_are_ranked_by_them() -> None:
    by_tasks = replace(CONFIG, score=ScoreConfig(depth=[DepthMetric.tasks]))
    other = replace(by_tasks, evaluate=EvaluateConfig(tasks=["b"]))
    assert _void(by_tasks, other) == {"score", "evaluate"}


def test_the_layout_decides_candidates_where_they_are_made_by_a_rule() -> None:
    ruled = replace(CONFIG, search=SearchConfig(divisors=["ffn"]))
    assert _void(ruled, _with(ruled, "parallel.tp", 2)) == {"search"}


def test_a_merge_of_heads_is_another_cut() -> None:
    plain = replace(CONFIG, prune=PruneConfig())
    assert _void(plain, _with(plain, "prune.heads", PruneConfig.heads.merge)) == {"search", "prune"}  # type: ignore[attr-defined]


def test_the_layout_decides_nothing_else() -> None:
    wide = replace(CONFIG, parallel=replace(CONFIG.parallel, tp=2, pp=2, sequence_parallel=True, virtual_stages=2))
    assert _void(CONFIG, wide) == set()
