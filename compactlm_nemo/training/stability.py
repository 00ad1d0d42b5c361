"""What keeps a long run alive: steps that are not finite are skipped, a loss that jumps sends the run back."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque

from compactlm_nemo.errors import NumericsError

WINDOW = 32
"""Steps whose median loss is the measure of a spike."""


FEWEST = 8
"""Steps that must have been seen before one can be a spike."""


_log = logging.getLogger(__name__)


class NonFiniteSteps:
    """Counts steps that must not reach the weights, because a loss term or the gradient norm is NaN or infinite.

    Equal on every rank, as what it looks at is.
    """

    def __init__(self, limit: int, skipped: int = 0) -> None:
        self.limit, self.in_a_row, self.skipped = limit, 0, skipped

    def should_skip(self, step: int, values: dict[str, float]) -> bool:
        """Whether to skip this step.

        Raises:
            NumericsError: after more than `limit` in a row, with the first value that is not finite.
        """
        name = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if name is None:
            self.in_a_row = 0
            return False
        self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
        _log.warning("distill: step %d: %s is %s; skipped.", step, name, values[name])
        if self.in_a_row > self.limit:
            raise NumericsError(
                f"distill: step {step}: {name} is {values[name]} for the {self.in_a_row}th step in a row; lower "
                f"distill.lr or look at the data (distill.skip_limit={self.limit})."
            )
        return True


class LossSpikes:
    """Sees a loss that exceeds `factor` times the median of the last steps; with None none is one."""

    def __init__(self, factor: float | None, limit: int, losses: list[float]) -> None:
        self.factor, self.limit = factor, limit
        self.losses = deque(losses, maxlen=WINDOW)

    def must_rewind(self, step: int, loss: float, num_before: int) -> bool:
        """Whether this step's loss is a spike; remembers it otherwise. What is not finite is for `NonFiniteSteps`.

        Raises:
            NumericsError: when it is one, and `limit` were met before.
        """
        if not math.isfinite(loss):
            return False
        if self.factor is None or len(self.losses) < FEWEST or loss <= self.factor * statistics.median(self.losses):
            self.losses.append(loss)
            return False
        median = statistics.median(self.losses)
        what = f"distill: step {step}: train/loss={loss:.4g} exceeds {self.factor:g} x the median {median:.4g}"
        if num_before >= self.limit:
            raise NumericsError(f"{what} for the {num_before + 1}th time; lower distill.lr or raise spike_factor.")
        _log.warning("%s; going back to the newest checkpoint and on with later batches.", what)
        return True
