"""Held-out losses on the way, and the weights that had the lowest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from compactlm_nemo.config.distill import Result
from compactlm_nemo.training.callbacks import Callback, Metrics, Step
from compactlm_nemo.training.checkpoint import Checkpoints
from compactlm_nemo.training.optimizer import TrainableModel

EVAL_LOSS = "eval/lm_loss_nats"
"""Mean of the LM loss over the held-out texts, by which weights are the best."""


class BestWeights(Callback):
    """Evaluates the model every `every` steps and keeps the checkpoint of the lowest held-out loss.

    Args:
        evaluate: Held-out metrics of the model as it is, `EVAL_LOSS` among them; collective.
        every: Steps between evaluations, which the last step of the schedule also gets; None never evaluates.
        num_steps: Steps of the schedule.
        result: Whether the model ends with the last weights or with the best.
        checkpoints: Checkpoints of the model.
    """

    def __init__(
        self,
        evaluate: Callable[[], Metrics],
        *,
        every: int | None,
        num_steps: int,
        result: Result,
        checkpoints: Checkpoints,
    ) -> None:
        self.evaluate, self.every, self.num_steps = evaluate, every, num_steps
        self.result, self.checkpoints = result, checkpoints
        self.best_step: int | None = None
        """Finished steps at the lowest held-out loss so far."""
        self.best_loss: float | None = None

    def after_step(self, step: Step) -> None:
        if self.every is None or (step.num_done % self.every and step.num_done != self.num_steps):
            return
        step.model.finish_gathering()
        values = self.evaluate()
        step.model.train()
        step.metrics |= values
        step.must_log = True
        if math.isfinite(values[EVAL_LOSS]) and (self.best_loss is None or values[EVAL_LOSS] < self.best_loss):
            self.best_step, self.best_loss = step.num_done, values[EVAL_LOSS]
            step.must_save = True

    def after_training(self, model: TrainableModel) -> None:
        if self.result is Result.best and self.best_step not in (None, self.num_steps):
            self.checkpoints.load_weights(model, self.best_step)

    def state(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state(self, state: dict[str, Any]) -> None:
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]

    def kept_checkpoints(self) -> set[int]:
        return set() if self.best_step is None else {self.best_step}
