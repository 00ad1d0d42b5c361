"""Teacher correction while distilling: after each step the teacher is trained on the batch that it has just taught.

The teacher's weights before step k are those after k - 1 steps of plain training on the student's batches, so its
targets for a batch never come from having seen that batch.

Source: "LLM Pruning and Distillation in Practice" (arXiv 2408.11796), section 2.1, which runs both at once.
"""

from __future__ import annotations

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.distill.teacher import NoTeacher
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.callbacks import Callback, Metrics, Step
from compactlm_nemo.training.checkpoint import Checkpoints, TrainState
from compactlm_nemo.training.optimizer import TrainableModel
from compactlm_nemo.training.stability import NonFiniteSteps
from compactlm_nemo.training.tracker import CORRECTION_LOSS, LOSS

NORM_NAME, RATE_NAME = "train/correct_grad_norm", "train/correct_lr"


class TeacherCorrection(Callback):
    """Trains the live teacher of a distillation with cross entropy on the batches of each step.

    Args:
        chunks: The live teacher's, on the student's mesh.
        cfg: Optimizer, schedule and loss; after `cfg.steps` steps the teacher stays as it is.
        checkpoints: Checkpoints of the teacher, in a folder of their own; one more is kept than of the student's.
    """

    def __init__(
        self,
        chunks: ModelChunks,
        cfg: DistillConfig,
        *,
        checkpoints: Checkpoints,
    ) -> None:
        self.cfg, self.chunks, self.checkpoints = cfg, chunks, checkpoints
        self.model = TrainableModel(chunks, cfg)
        self.non_finite = NonFiniteSteps(cfg.skip_limit)

    def after_step(self, step: Step) -> None:
        if step.number < self.cfg.steps:
            step.metrics |= self.train_on(step.number, step.batches)

    def train_on(self, step: int, batches: list[Batch]) -> Metrics:
        """Train the teacher on the batches of 0-based `step` and return the metrics of its training.

        A gradient that is not finite is not followed, and too many in a row end the run, as with the student's.
        """
        self.model.advance_schedule()
        self.chunks.train()
        terms = forward_backward(
            self.model.ddps, NoTeacher(self.chunks.mesh), batches, loss=self.cfg.loss, temperature=1.0
        )
        self.chunks.eval()
        grad_norm = self.model.gradient_norm()
        metrics = {CORRECTION_LOSS: terms[LOSS], NORM_NAME: grad_norm}
        if not self.non_finite.should_skip(Step(number=step, model=self.model, batches=batches, metrics=metrics)):
            self.model.update(grad_norm)
        return metrics | {RATE_NAME: self.model.lr}

    def save(self, step: int) -> Checkpoints:
        self.checkpoints.save(self.model, TrainState(step=step))
        return self.checkpoints

    def load(self, step: int) -> None:
        self.checkpoints.load(self.model, step=step)
