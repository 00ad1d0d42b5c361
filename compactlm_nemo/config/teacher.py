"""Settings of the teacher while it teaches: stored targets, and its correction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class TeacherSource(Enum):
    """The source of the student's targets: a live teacher, one stored by `recipes.cache_teacher`, or no teacher."""

    live = "live"
    stored = "stored"
    none = "none"


class StoredKind(Enum):
    """What is stored of a teacher: the probabilities of its likeliest tokens, or its final hidden states."""

    top_k = "top_k"
    hidden = "hidden"


@dataclass(kw_only=True)
class CacheConfig:
    """Settings of `recipes.cache_teacher`, which stores targets for a run with `distill.teacher=stored`."""

    kind: StoredKind = setting(StoredKind.top_k)
    """top_k: probabilities of the likeliest tokens and of the rest. hidden: final hidden states as they are, from which
    every loss is computed as with a live teacher."""
    k: int = setting(64)
    """Tokens of `cache.kind=top_k`; one more outcome stands for the rest of the vocabulary."""
    samples: int | None = setting(None)
    """Samples of the training order to store; null stores `distill.steps` x `distill.global_batch`."""
    shard_samples: int = setting(256, changes_result=False)
    """Samples in a file."""
    micro_batch: int = setting(4, changes_result=False)
    """Samples per forward pass on one rank."""

    def __post_init__(self) -> None:
        for name in ("k", "shard_samples", "micro_batch", "samples"):
            value = getattr(self, name)
            require(value is None or value > 0, f"cache.{name}={value} must be > 0.")


@dataclass(kw_only=True)
class CorrectConfig:
    """Training of the teacher on the distillation's data before it teaches (`recipes.correct_teacher`) or meanwhile;
    what is not here is as in `distill`. The paper: 120 steps of warm-up to a fifth of the teacher's own peak rate."""

    steps: int = setting(0)
    """Optimizer steps; 0 leaves the teacher as it is."""
    while_distilling: bool = setting(False)
    """Train the teacher while it teaches, on each batch after it was taught, instead of before."""
    lr: float = setting(2e-5)
    """Peak learning rate."""
    min_lr: float = setting(0.0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = setting(120)
    """Steps of linear warm-up from 0; at most half of `correct.steps` are taken."""

    def at_most(self, steps: int) -> CorrectConfig:
        """Return these settings with at most `steps` steps, where the teacher is corrected while it teaches."""
        return replace(self, steps=min(self.steps, steps)) if self.while_distilling else self

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"correct.steps={self.steps} must be >= 0; 0 leaves the teacher as it is.")
        require(self.lr > 0, f"correct.lr={self.lr} must be > 0; try a fifth of the teacher's own.")
        require(
            0 <= self.min_lr <= self.lr, f"correct.min_lr={self.min_lr} must be in [0, correct.lr={self.lr}]; lower it."
        )
        require(self.warmup_steps >= 0, f"correct.warmup_steps={self.warmup_steps} must be >= 0; 0 is none.")
