"""Settings of distillation: the loss, the optimizer, and what guards a long run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from compactlm_nemo.config.choices import Result, StoredKind, TeacherSource
from compactlm_nemo.config.hidden import HiddenConfig
from compactlm_nemo.errors import require

SPEED_ONLY = {
    "micro_batch",
    "loss_memory_mib",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "stop_after",
    "peak_tflops",
    "eval_every",
    "eval_tokens",
    "shard_samples",
    "recompute",
    "overlap",
    "teacher_tp",
    "teacher_pp",
}
"""Settings that change memory, speed or output, not the result; they may differ when a run goes on."""


def deciding(section: Any) -> dict[str, Any]:
    """The settings of a section that decide its result."""
    return {name: value for name, value in vars(section).items() if name not in SPEED_ONLY}


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the losses in their sum; 0 leaves one out. The paper's final recipe is the forward KL alone."""

    forward_kl: float = 1.0
    """KL(teacher || student)."""
    reverse_kl: float = 0.0
    """KL(student || teacher)."""
    jsd: float = 0.0
    """b KL(teacher || m) + (1 - b) KL(student || m), m = b teacher + (1 - b) student, b = `distill.loss.jsd_beta`."""
    jsd_beta: float = 0.5
    """Share of the teacher in the mixture of `distill.loss.jsd`."""
    skewed_kl: float = 0.0
    """KL(teacher || a teacher + (1 - a) student), a = `distill.loss.skew`."""
    skew: float = 0.1
    """Share of the teacher in the mixture of `distill.loss.skewed_kl`."""
    mse: float = 0.0
    """Mean over the vocabulary of the squared difference of the logits."""
    cosine: float = 0.0
    """1 - the cosine of the logits."""
    cross_entropy: float = 0.0
    """Language-model loss of the student, without a teacher, at temperature 1."""

    def __post_init__(self) -> None:
        names = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "mse", "cosine", "cross_entropy")
        for name in names:
            weight = getattr(self, name)
            require(0 <= weight < math.inf, f"distill.loss.{name}={weight} must be >= 0; 0 leaves it out.")
        require(any(getattr(self, name) for name in names), "distill.loss has no weight > 0; forward_kl=1 is usual.")
        require(0 < self.jsd_beta < 1, f"distill.loss.jsd_beta={self.jsd_beta} must be in (0, 1); 0.5 is symmetric.")
        require(0 <= self.skew < 1, f"distill.loss.skew={self.skew} must be in [0, 1); 0.1 is usual.")


CROSS_ENTROPY = LossConfig(forward_kl=0.0, cross_entropy=1.0)
"""Plain training."""


@dataclass(kw_only=True)
class CacheConfig:
    """What `recipes.cache_teacher` stores for a run with `distill.teacher=stored`."""

    kind: StoredKind = StoredKind.top_k
    """top_k: probabilities of the likeliest tokens and of the rest. hidden: final hidden states as they are, from which
    every loss is computed as with a live teacher."""
    k: int = 64
    """Tokens of `cache.kind=top_k`; one more outcome stands for the rest of the vocabulary."""
    samples: int | None = None
    """Samples of the training order to store; null stores `distill.steps` x `distill.global_batch`."""
    shard_samples: int = 256
    """Samples in a file."""
    micro_batch: int = 4
    """Samples per forward pass on one rank."""

    def __post_init__(self) -> None:
        for name in ("k", "shard_samples", "micro_batch", "samples"):
            value = getattr(self, name)
            require(value is None or value > 0, f"cache.{name}={value} must be > 0.")


@dataclass(kw_only=True)
class CorrectConfig:
    """Training of the teacher on the distillation's data before it teaches (`recipes.correct_teacher`) or meanwhile;
    what is not here is as in `distill`. The paper: 120 steps of warm-up to a fifth of the teacher's own peak rate."""

    steps: int = 0
    """Optimizer steps; 0 leaves the teacher as it is."""
    beside: bool = False
    """Train the teacher while it teaches, on each batch after it was taught, instead of before."""
    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 120
    """Steps of linear warm-up from 0; at most half of `correct.steps` are taken."""

    def at_most(self, steps: int) -> CorrectConfig:
        """The same for a training of so many steps, where it runs beside it."""
        return replace(self, steps=min(self.steps, steps)) if self.beside else self

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"correct.steps={self.steps} must be >= 0; 0 leaves the teacher as it is.")
        require(self.lr > 0, f"correct.lr={self.lr} must be > 0; try a fifth of the teacher's own.")
        require(
            0 <= self.min_lr <= self.lr, f"correct.min_lr={self.min_lr} must be in [0, correct.lr={self.lr}]; lower it."
        )
        require(self.warmup_steps >= 0, f"correct.warmup_steps={self.warmup_steps} must be >= 0; 0 is none.")


@dataclass(kw_only=True)
class DistillConfig:
    teacher: TeacherSource = TeacherSource.live
    """live, or stored: what recipes.cache_teacher wrote takes its place, and no teacher is loaded; none: plain training
    on `distill.loss.cross_entropy`."""
    teacher_tp: int | None = None
    """Tensor-parallel ranks of a live teacher; null takes `parallel.tp`. With another layout than the student's the
    teacher stands on a mesh of its own over the same processes."""
    teacher_pp: int | None = None
    """Pipeline stages of a live teacher; null takes `parallel.pp`."""
    steps: int = 1000
    """Optimizer steps."""
    stop_after: int | None = None
    """Stop after so many of the steps, to go on in a later run; null trains to the end."""
    global_batch: int = 8
    """Samples of one step over all data-parallel ranks."""
    micro_batch: int = 1
    """Samples of one forward/backward on one rank."""
    temperature: float = 1.0
    """Softmax temperature of teacher and student, > 0; the loss is scaled by its square."""
    loss: LossConfig = field(default_factory=LossConfig)
    hidden: HiddenConfig = field(default_factory=HiddenConfig)
    loss_memory_mib: int | None = None
    """Memory on each rank for the logits of a loss, of which so many tokens exist at once as fit; in MiB. null takes
    256, or half of the output layer's gradient where that is more."""
    recompute: bool = False
    """Keep each layer's input only and run its forward pass again in backward: a third more time, less memory."""
    overlap: bool = False
    """Sum gradients over data-parallel ranks during backward, and gather the new weights while the teacher runs."""
    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 4.5e-7
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    beta1: float = 0.9
    """Adam."""
    beta2: float = 0.95
    """Adam."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_every: int = 1
    """Steps between metric lines."""
    skip_limit: int = 5
    """Steps in a row that may be skipped because a loss term or the gradient is not finite; one more ends the run."""
    spike_factor: float | None = None
    """Go back to the newest checkpoint, and on with later batches, when the loss exceeds so many times the median of
    the last 32 steps; null never does."""
    spike_limit: int = 5
    """Times that a run may go back; once more ends it."""
    eval_every: int | None = None
    """Steps between measurements of LM loss and KL on the held-out texts; null measures at the end of the run only."""
    eval_tokens: int = 8192
    """Tokens of each held-out text that are measured on the way."""
    result: Result = Result.last
    """Which weights become the student: last, or best by the held-out LM loss on the way (needs `eval_every`)."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for the model FLOPs utilisation; null looks its name up."""

    @property
    def num_samples(self) -> int:
        """Samples of the whole training."""
        return self.steps * self.global_batch

    def __post_init__(self) -> None:
        require(self.steps > 0, f"distill.steps={self.steps} must be > 0.")
        require(
            self.stop_after is None or 0 < self.stop_after <= self.steps,
            f"distill.stop_after={self.stop_after} must be in [1, distill.steps={self.steps}]; null trains to the end.",
        )
        require(self.temperature > 0, f"distill.temperature={self.temperature} must be > 0; 1.0 is plain KL.")
        for name in (
            "global_batch",
            "micro_batch",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            require(getattr(self, name) > 0, f"distill.{name}={getattr(self, name)} must be > 0.")
        for name in ("skip_limit", "spike_limit"):
            require(getattr(self, name) >= 0, f"distill.{name}={getattr(self, name)} must be >= 0; 5 is usual.")
        for name in ("loss_memory_mib", "eval_every", "eval_tokens", "peak_tflops", "teacher_tp", "teacher_pp"):
            value = getattr(self, name)
            require(value is None or value > 0, f"distill.{name}={value} must be > 0; or leave it out.")
        require(
            self.spike_factor is None or self.spike_factor > 1,
            f"distill.spike_factor={self.spike_factor} must be > 1; try 3, null is off.",
        )
        require(
            self.result is Result.last or self.eval_every is not None,
            f"distill.result={self.result.name} needs distill.eval_every; set it, or result=last.",
        )
        require(self.weight_decay >= 0, f"distill.weight_decay={self.weight_decay} must be >= 0; 0 is off.")
        require(self.clip_grad >= 0, f"distill.clip_grad={self.clip_grad} must be >= 0; 0 is off.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"distill.{name}={getattr(self, name)} must be in [0, 1); try 0.9.")
        require(self.lr > 0, f"distill.lr={self.lr} must be > 0; the paper uses 2e-4.")
        require(
            0 <= self.min_lr <= self.lr,
            f"distill.min_lr={self.min_lr} must be in [0, distill.lr={self.lr}]; lower it.",
        )
        require(
            0 <= self.warmup_steps < self.steps,
            f"distill.warmup_steps={self.warmup_steps} must be in [0, distill.steps={self.steps}); lower it.",
        )
