"""The optional parts of a training: what the loop calls at its fixed moments, and the parts that need few lines.

A part is a subclass of `Callback` that overrides the moments it needs, and one line where the stage lists its
callbacks. The loop calls every method on every rank, in the order of the list.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from compactlm_nemo.parallel.hang import beat
from compactlm_nemo.parallel.interruption import boundary
from compactlm_nemo.parallel.world import is_main_rank
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.optimizer import TrainableModel

Metrics = dict[str, float]
"""W&B name -> value, equal on every rank."""


@dataclass(kw_only=True)
class Step:
    """One training step, filled by the loop while it runs and extended by callbacks."""

    number: int
    """0-based."""
    model: TrainableModel
    """The model that is trained."""
    batches: list[Batch]
    """This rank's micro-batches."""
    metrics: Metrics = field(default_factory=dict)
    """Loss terms, then gradient norm and learning rate, then what callbacks add."""
    is_last: bool = False
    """Whether training ends after this step; known from `after_step` on."""
    must_log: bool = False
    """Set by a callback whose metrics must be written although no line is due."""
    must_save: bool = False
    """Set by a callback that needs a checkpoint of this step although none is due."""

    @property
    def num_done(self) -> int:
        """Return the number of finished steps once this step is."""
        return self.number + 1


class ModelPass(Protocol):
    """The schedule of the trained model over the micro-batches of a step."""

    batches: list[Batch]

    def run(self, *, forward_only: bool = False) -> Metrics:
        """Run the schedule and return its loss terms; without `forward_only` gradients are added up."""

    def logit_loss(self, terms: Metrics) -> float:
        """Return the weighted sum of those terms that compare logits with the teacher's."""


class Saving(Protocol):
    """Files that threads of every rank may still be writing."""

    def is_written(self) -> bool:
        """Return whether this rank has written its files."""

    def finish(self) -> None:
        """Wait for the files of all ranks, and let them come into force. Collective."""


class Callback:
    """An optional part of a training; every method may be overridden and does nothing by default."""

    needs_initial_checkpoint: bool = False
    """Whether training saves a checkpoint before its first step."""

    def must_stop(self, num_done: int) -> bool:
        """Return whether training ends after `num_done` finished steps, before the last step of its schedule."""
        return False

    def before_step(self, step: int) -> None:
        """Prepare for 0-based `step`, whose batches are not loaded yet."""

    def before_teacher(self) -> None:
        """Prepare for the teacher's pass over the micro-batches of the step."""

    def before_student(self, student: ModelPass) -> None:
        """Prepare for the student's pass, after the teacher's; `student.run` may run it once more in advance."""

    def before_micro_batch(self, idx: int) -> None:
        """Prepare for micro-batch `idx`, which a chunk of the student on this rank runs forward next."""

    def after_student(self, student: ModelPass, terms: Metrics) -> None:
        """Take or extend, in place, the loss terms of the student's pass that has ended."""

    def must_rewind(self, step: Step) -> bool:
        """Return whether to discard the step, whose loss terms are known, and go back to the newest checkpoint."""
        return False

    def should_skip(self, step: Step) -> bool:
        """Return whether the step, whose gradient norm is known, leaves the weights as they are."""
        return False

    def after_update(self, step: Step) -> None:
        """Act after the optimizer has moved the weights; not called for a skipped step."""

    def after_step(self, step: Step) -> None:
        """Act after the step, skipped or not; metrics may be added to it."""

    def after_training(self, model: TrainableModel) -> None:
        """Act after the last step of the schedule, which this process or an earlier one has finished."""

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values for a checkpoint, equal on every rank; stored under the name of the class."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, when training is resumed and when it rewinds."""

    def save(self, step: int) -> Saving | None:
        """Save files of this callback's own for the checkpoint of `step` finished steps.

        Files that are still written when this returns are returned: the checkpoint comes into force after them.
        """
        return None

    def load(self, step: int) -> None:
        """Go on from the checkpoint of `step` finished steps, when training is resumed and when it rewinds."""

    def kept_checkpoints(self) -> set[int]:
        """Return the finished steps of the checkpoints that must not be deleted."""
        return set()


class StopAfter(Callback):
    """Ends a training after some of its steps, for a later run to go on; the schedule stays that of the whole.

    Args:
        steps: Finished steps at which to stop; None never does.
    """

    def __init__(self, steps: int | None) -> None:
        self.steps = steps

    def must_stop(self, num_done: int) -> bool:
        return self.steps is not None and num_done >= self.steps


class StopWhenAsked(Callback):
    """Ends a training that a signal or the end of a job stops, after a checkpoint, and saves by the clock.

    Args:
        minutes: Minutes between checkpoints, on the main rank's clock; None saves by steps alone.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes, self.number, self.save_is_due = minutes, 0, False
        self.last_save = time.monotonic()

    def must_stop(self, num_done: int) -> bool:
        beat(f"after step {num_done}")
        due = self.minutes is not None and is_main_rank() and time.monotonic() - self.last_save > 60 * self.minutes
        self.number, self.save_is_due = boundary(due)
        return self.number > 0

    def after_step(self, step: Step) -> None:
        step.must_save |= self.save_is_due

    def save(self, step: int) -> None:
        self.last_save = time.monotonic()


class Speed(Callback):
    """Measures the time of a step, from loading its batches to the callbacks before this one.

    Args:
        measure: Metrics of speed from the seconds of the step.
    """

    def __init__(self, measure: Callable[[float], Metrics]) -> None:
        self.measure, self.start = measure, 0.0

    def before_step(self, step: int) -> None:
        self.start = time.perf_counter()

    def after_step(self, step: Step) -> None:
        seconds = time.perf_counter() - self.start
        step.metrics |= self.measure(seconds) | {"perf/step_seconds": seconds}


class PeakMemory(Callback):
    """Measures the peak bytes of this rank: device memory on CUDA, resident set on a CPU.

    Args:
        planned_bytes: What `recipes.plan` said of the fullest rank, which is logged beside it; None where it did not.
    """

    def __init__(self, planned_bytes: int | None = None) -> None:
        self.planned_bytes = planned_bytes

    def after_step(self, step: Step) -> None:
        if torch.cuda.is_available():
            peak_bytes = torch.cuda.max_memory_allocated()
        else:
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        step.metrics["perf/peak_memory_bytes"] = float(peak_bytes)
        if self.planned_bytes is not None:
            step.metrics["perf/planned_memory_bytes"] = float(self.planned_bytes)


class MetricsLog(Callback):
    """Logs the metrics of every `every`-th step, of the last one, and of those that must be logged; comes last.

    Args:
        log: Called with a 0-based step and its metrics.
        rewind: Called with the 0-based step from which training goes on: metrics of it and later steps are void.
    """

    def __init__(
        self, log: Callable[[int, Metrics], None], *, every: int, rewind: Callable[[int], None] = lambda step: None
    ) -> None:
        self.log, self.every, self.rewind = log, every, rewind

    def after_step(self, step: Step) -> None:
        if step.num_done % self.every == 0 or step.is_last or step.must_log:
            self.log(step.number, step.metrics)

    def load(self, step: int) -> None:
        self.rewind(step)
