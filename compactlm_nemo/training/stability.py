"""Stability of a long run: steps that are not finite are skipped, and a loss that jumps sends the run back."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from typing import Any

from compactlm_nemo.errors import NumericsError
from compactlm_nemo.training.callbacks import Callback, Step
from compactlm_nemo.training.tracker import LOSS

WINDOW = 32
"""Steps whose median loss is the measure of a spike."""


FEWEST = 8
"""Steps that must have been seen before one can be a spike."""


_log = logging.getLogger(__name__)


class NonFiniteSteps(Callback):
    """Skips steps whose loss terms or gradient norm are NaN or infinite, and counts them.

    Metrics are equal on every rank, so all ranks skip together.

    Args:
        limit: Steps in a row that may be skipped.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row, self.skipped = limit, 0, 0

    def should_skip(self, step: Step) -> bool:
        """Return whether a metric of the step is not finite, and count the step.

        Raises:
            NumericsError: after more than `limit` in a row, with the first metric that is not finite.
        """
        name = next((name for name, value in step.metrics.items() if not math.isfinite(value)), None)
        if name is None:
            self.in_a_row = 0
            return False
        self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
        what = f"distill: step {step.number}: {name} is {step.metrics[name]}"
        _log.warning("%s; skipped.", what)
        if self.in_a_row > self.limit:
            raise NumericsError(
                f"{what} for the {self.in_a_row}th step in a row; lower distill.lr or look at the data "
                f"(distill.skip_limit={self.limit})."
            )
        return True

    def after_step(self, step: Step) -> None:
        step.metrics["train/skipped_steps"] = float(self.skipped)

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]  # a run that is stopped and goes on does not start to count again
        self.skipped = max(self.skipped, state["skipped"])  # a rewind takes no skipped step back


class LossSpikes(Callback):
    """Sends training back when a loss exceeds `factor` times the median of the last steps, on with later batches.

    Args:
        factor: None never does.
        limit: Times that training may go back.
    """

    def __init__(self, factor: float | None, limit: int) -> None:
        self.factor, self.limit, self.rewinds = factor, limit, 0
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.needs_initial_checkpoint = factor is not None

    def must_rewind(self, step: Step) -> bool:
        """Return whether the step's loss is a spike, else remember it; a loss that is not finite is neither.

        Raises:
            NumericsError: when the loss is a spike, and `limit` spikes came before.
        """
        loss = step.metrics[LOSS]
        if not math.isfinite(loss):
            return False
        if self.factor is None or len(self.losses) < FEWEST or loss <= self.factor * statistics.median(self.losses):
            self.losses.append(loss)
            return False
        median = statistics.median(self.losses)
        what = f"distill: step {step.number}: train/loss={loss:.4g} exceeds {self.factor:g} x the median {median:.4g}"
        self.rewinds += 1
        if self.rewinds > self.limit:
            raise NumericsError(f"{what} for the {self.rewinds}th time; lower distill.lr or raise spike_factor.")
        _log.warning("%s; going back to the newest checkpoint and on with later batches.", what)
        return True

    def after_step(self, step: Step) -> None:
        step.metrics["train/rewinds"] = float(self.rewinds)

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "rewinds": self.rewinds}

    def load_state(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.rewinds = max(self.rewinds, state["rewinds"])  # a checkpoint that a rewind loads is from before it
