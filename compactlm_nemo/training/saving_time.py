"""How long saving holds up a training, measured."""

from __future__ import annotations

import time
from typing import Any

from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.training.callbacks import Callback, Step
from compactlm_nemo.training.checkpoint import Checkpoints

SAVING_SECONDS, SAVING_SHARE = "perf/checkpoint_seconds", "perf/checkpoint_share"


class SavingTime(Callback):
    """Measures for how many seconds saving has held up a training, and their share of its time, over all its processes.

    A process counts from when this object is made; what one did after its last checkpoint, and was killed, is lost.

    Args:
        checkpoints: Checkpoints of the model.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints, self._start, self._has_trained = checkpoints, time.monotonic(), False
        self._before = (0.0, 0.0)

    @property
    def seconds(self) -> float:
        """Return the seconds for which saving has held up training so far."""
        return self._before[0] + self._checkpoints.seconds

    @property
    def training_seconds(self) -> float:
        """Return the seconds of the training so far, saving included."""
        return self._before[1] + time.monotonic() - self._start

    def before_step(self, step: int) -> None:
        self._has_trained = True

    def after_step(self, step: Step) -> None:
        step.metrics |= {SAVING_SECONDS: self.seconds, SAVING_SHARE: self.seconds / self.training_seconds}

    def state(self) -> dict[str, Any]:
        saving, training = broadcast_object((self.seconds, self.training_seconds))  # the main rank's clock
        return {"seconds": saving, "training_seconds": training}

    def load_state(self, state: dict[str, Any]) -> None:
        if not self._has_trained:  # a rewind takes no time back
            self._before = state["seconds"], state["training_seconds"]

    def totals(self) -> dict[str, float]:
        """Return the seconds for which saving has held up training, and those of the training, for its manifest."""
        return {"saving_seconds": self.seconds, "training_seconds": self.training_seconds}


def saving_text(saving_seconds: float, training_seconds: float) -> str:
    """Return what saving has cost a training, in words."""
    share = saving_seconds / training_seconds
    return f"saving held up training for {saving_seconds:.1f} s of {training_seconds:.1f} s ({share:.1%})"
