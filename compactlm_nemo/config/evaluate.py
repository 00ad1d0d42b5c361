"""Settings of the evaluation, and of the comparison of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.config.score import WidthMetric
from compactlm_nemo.errors import require

LONGEST_LOOP, LOOP_ROUNDS = 16, 3
"""Tokens of the longest n-gram whose repetition is called a loop, and how often it must stand there at least."""


@dataclass(kw_only=True)
class ContinuationsConfig:
    """What a model writes by itself, taking the likeliest token each time, behind the beginnings of held-out texts."""

    prompts: int = setting(0)
    """Documents that are continued, of the held-out texts in turn, or as many as have more than `prompt_tokens`; 0
    measures none."""
    tokens: int = setting(64, changes_result=lambda cfg: cfg.prompts > 0)
    """Most tokens of a continuation; it ends with the token that ends documents, or the tokenizer's eos_token."""
    prompt_tokens: int = setting(32, changes_result=lambda cfg: cfg.prompts > 0)
    """Tokens of a document that stand in front."""

    def __post_init__(self) -> None:
        name, least = "evaluate.continuations", LONGEST_LOOP * LOOP_ROUNDS
        require(self.prompts >= 0, f"{name}.prompts={self.prompts} must be >= 0; 0 measures none.")
        require(
            self.tokens >= least,
            f"{name}.tokens={self.tokens} must be >= {least}, as many as show that {LONGEST_LOOP} tokens repeat "
            f"{LOOP_ROUNDS} times; try 64.",
        )
        require(self.prompt_tokens > 0, f"{name}.prompt_tokens={self.prompt_tokens} must be > 0; try 32.")
        for field in ("tokens", "prompt_tokens"):
            is_idle = self.prompts == 0 and getattr(self, field) != getattr(type(self), field)
            require(
                not is_idle,
                f"{name}.{field}={getattr(self, field)} has no effect while prompts=0; set {name}.prompts, or leave it "
                "out.",
            )


@dataclass(kw_only=True)
class EvaluateConfig:
    tokens: int = setting(16384)
    """Held-out tokens per text (whole windows; fewer when the text is shorter)."""
    micro_batch: int = setting(4, changes_result=False)
    """Samples per forward pass on one rank; of questions and continuations as many as have that many tokens."""

    choices: dict[str, Any] = setting({}, changes_result=False)
    """Multiple-choice questions, name to JSON-lines file, packed or not, of `question`, `choices` and `answer`, which
    the models answer by likelihood; the files' content decides the result."""
    bias: dict[str, Any] = setting({}, changes_result=False)
    """Questions about groups of people, name to a file of BBQ, or of BBQ Lite in BIG-bench; the files' content decides
    the result."""
    continuations: ContinuationsConfig = setting(ContinuationsConfig())

    resamples: int = setting(1000)
    """Random draws of documents (or questions) behind every interval and every p in `quality.json`, at least 100."""

    tasks: list[str] = setting([])
    """lm-eval tasks, run on teacher, pruned and distilled model as exported (needs the `eval` extra)."""
    task_folder: str | None = setting(None)
    """Folder with further lm-eval task files."""
    task_limit: int | None = setting(None)
    """Samples of each task; null takes all."""

    def __post_init__(self) -> None:
        require(self.tokens > 0, f"evaluate.tokens={self.tokens} must be > 0.")
        require(self.micro_batch > 0, f"evaluate.micro_batch={self.micro_batch} must be > 0.")
        require(
            self.resamples >= 100,
            f"evaluate.resamples={self.resamples} must be at least 100, or intervals are chance; 1000 is usual.",
        )
        require(
            self.task_limit is None or self.task_limit > 0,
            f"evaluate.task_limit={self.task_limit} must be > 0; null takes all samples.",
        )
        for kind in ("choices", "bias"):
            files = getattr(self, kind)
            require(
                isinstance(files, Mapping) and all(isinstance(path, str) and path for path in files.values()),
                f"evaluate.{kind}={files} must be {{NAME: FILE}}; for example evaluate.{kind}.own=questions.jsonl.",
            )


@dataclass(kw_only=True)
class CompareConfig:
    """Settings of `recipes.compare_scores`, which reads finished scores and belongs to no run."""

    a: str = MISSING
    """Scores file, or the folder of a score stage."""
    b: str = MISSING
    """Scores of the same model to compare with; may be the same file."""
    width_a: WidthMetric | None = None
    """Width metric of `a` to compare with `width_b` of `b`, and nothing else; null compares all metrics in both."""
    width_b: WidthMetric | None = None
    """Width metric of `b` to compare with `width_a` of `a`; set both or none."""
    dry_run: bool = False
    """Check that both files can be compared, print the resolved configuration, and exit 0."""

    def __post_init__(self) -> None:
        given, other = ("width_a", "width_b") if self.width_a else ("width_b", "width_a")
        require(
            (self.width_a is None) == (self.width_b is None),
            f"{given} is set and {other} is not; name one metric of each file, or leave both out.",
        )
