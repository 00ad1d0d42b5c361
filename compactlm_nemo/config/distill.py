"""Settings of distillation: teacher, optimizer, and what keeps a long run stable."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.config.loss import HiddenConfig, LossConfig
from compactlm_nemo.config.teacher import TeacherSource
from compactlm_nemo.errors import require


class Result(Enum):
    """Which of a training's weights are its result."""

    last = "last"
    best = "best"


class Recompute(Enum):
    """What a training computes again in its backward pass instead of keeping it."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass(kw_only=True)
class DistillConfig:
    teacher: TeacherSource = setting(TeacherSource.live)
    """live, or stored: what recipes.cache_teacher wrote takes its place, and no teacher is loaded; none: plain training
    on `distill.loss.cross_entropy`."""
    teacher_tp: int | None = setting(None, changes_result=False)
    """Tensor-parallel ranks of a live teacher; null takes `parallel.tp`. With another layout than the student's the
    teacher stands on a mesh of its own over the same processes."""
    teacher_pp: int | None = setting(None, changes_result=False)
    """Pipeline stages of a live teacher; null takes `parallel.pp`."""
    steps: int = setting(1000)
    """Optimizer steps."""
    stop_after: int | None = setting(None, changes_result=False)
    """Stop after so many of the steps, to go on in a later run; null trains to the end."""
    start_from: str | None = setting(None, changes_result=False)
    """Folder of a finished distill stage whose student trains on: with a new optimizer, the schedule of these settings,
    and the samples after those it has seen. null begins with the pruned student. What the folder holds is part of the
    result, where it lies is not."""
    global_batch: int = setting(8)
    """Samples of one step over all data-parallel ranks."""
    micro_batch: int = setting(1, changes_result=False)
    """Samples of one forward/backward on one rank."""
    temperature: float = setting(1.0)
    """Softmax temperature of teacher and student, > 0; the loss is scaled by its square."""
    loss: LossConfig = setting(LossConfig())
    hidden: HiddenConfig = setting(HiddenConfig())
    loss_memory_mib: int | None = setting(None, changes_result=False)
    """Memory on each rank for the logits of a loss, of which so many tokens exist at once as fit; in MiB. null takes
    256, on a GPU 1024, or half of the output layer's float32 gradient where that is more."""
    recompute: Recompute = setting(Recompute.none, changes_result=False)
    """What backward computes again instead of keeping it: none; selective, the MLP or the experts of each layer, of
    which it keeps the input; full, each layer, of which it keeps the input alone. Of a dense layer's activations
    selective keeps about half, for half of the time that full takes, a third more than none."""
    overlap: bool = setting(False, changes_result=False)
    """Sum gradients over data-parallel ranks during backward, and gather the new weights while the teacher runs."""
    lr: float = setting(2e-4)
    """Peak learning rate."""
    min_lr: float = setting(4.5e-7)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = setting(0)
    """Steps of linear warm-up from 0."""
    weight_decay: float = setting(0.1)
    """Decoupled weight decay; norms and biases are exempt."""
    beta1: float = setting(0.9)
    """Adam."""
    beta2: float = setting(0.95)
    """Adam."""
    clip_grad: float = setting(1.0)
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    checkpoint_every: int = setting(200, changes_result=lambda cfg: cfg.spike_factor is not None)
    """Steps between checkpoints, to which a loss spike goes back; the last step is always saved."""
    checkpoint_minutes: float | None = setting(None, changes_result=lambda cfg: cfg.spike_factor is not None)
    """Minutes after which there is a checkpoint, besides those by steps; null counts steps alone."""
    checkpoint_async: bool | None = setting(None, changes_result=False)
    """Train on while the files of a checkpoint are written, from a copy in host memory; false waits for them. null is
    true on GPUs, whose states come to the host in any case, and false on a CPU, where the copy is a second training."""
    keep_checkpoints: int = setting(2, changes_result=False)
    """Newest checkpoints kept."""
    log_every: int = setting(1, changes_result=False)
    """Steps between metric lines."""
    skip_limit: int = setting(5)
    """Steps in a row that may be skipped because a loss term or the gradient is not finite; one more ends the run."""
    spike_factor: float | None = setting(None)
    """Go back to the newest checkpoint, and on with later batches, when the loss exceeds so many times the median of
    the last 32 steps; null never does."""
    spike_limit: int = setting(5)
    """Times that a run may go back; once more ends it."""
    eval_every: int | None = setting(None, changes_result=lambda cfg: cfg.result is Result.best)
    """Steps between measurements of LM loss and KL on the held-out texts; null measures at the end of the run only."""
    eval_tokens: int = setting(8192, changes_result=lambda cfg: cfg.result is Result.best)
    """Tokens of each held-out text that are measured on the way."""
    result: Result = setting(Result.last)
    """Which weights become the student: last, or best by the held-out LM loss on the way (needs `eval_every`)."""
    peak_tflops: float | None = setting(None, changes_result=False)
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
        for name in (
            "loss_memory_mib",
            "eval_every",
            "eval_tokens",
            "peak_tflops",
            "teacher_tp",
            "teacher_pp",
            "checkpoint_minutes",
        ):
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
