"""A teacher that is corrected while it teaches: after each step it is trained on the batch that it has just taught.

Its weights before step k are those after k - 1 steps of plain training on the student's batches, so what it says of a
batch never comes from having seen it.

Source: "LLM Pruning and Distillation in Practice" (arXiv 2408.11796), section 2.1, which runs both at once.
"""

from __future__ import annotations

from pathlib import Path

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.distill.teacher import Batch, NoTeacher
from compactlm_nemo.models.build import ModelChunks, recompute_activations
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.checkpoint import TrainState, load_training, save_training
from compactlm_nemo.training.optimizer import build_optimizer, build_schedule, gradient_norm, wrap_data_parallel
from compactlm_nemo.training.stability import NonFiniteSteps
from compactlm_nemo.training.tracker import LOSS

LOSS_NAME, NORM_NAME, RATE_NAME = "train/correct_loss", "train/correct_grad_norm", "train/correct_lr"


class TeacherCorrection:
    """The teacher's training; all of it is collective.

    Args:
        chunks: The live teacher's, on the student's mesh.
        cfg: How it is trained; after `cfg.steps` steps it stays as it is.
        checkpoints: Folder of its own.
    """

    def __init__(
        self,
        chunks: ModelChunks,
        dims: Dims,
        mesh: Mesh,
        cfg: DistillConfig,
        *,
        chunk_tokens: int,
        checkpoints: Path,
        is_main: bool,
    ) -> None:
        self.dims, self.mesh, self.cfg, self.chunk_tokens = dims, mesh, cfg, chunk_tokens
        self.checkpoints, self.is_main = checkpoints, is_main
        if cfg.recompute:
            recompute_activations(chunks)
        self.chunks, self.ddps = chunks, wrap_data_parallel(chunks)
        self.optimizer = build_optimizer(self.ddps, cfg)
        self.schedule = build_schedule(self.optimizer, cfg)
        self.non_finite = NonFiniteSteps(cfg.skip_limit)

    def train_on(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """Train on what was taught in this 0-based step; its metrics, none when correction is over.

        A gradient that is not finite is not followed, and too many in a row end the run, as with the student's.
        """
        if step >= self.cfg.steps:
            return {}
        self.schedule.step(1)
        self.chunks.train()
        terms = forward_backward(
            self.ddps, NoTeacher(self.mesh), self.dims, self.mesh, batches,
            loss=self.cfg.loss, temperature=1.0, chunk_tokens=self.chunk_tokens,
        )  # fmt: skip
        self.chunks.eval()
        values = {LOSS_NAME: terms[LOSS], NORM_NAME: gradient_norm(self.optimizer)}
        if not self.non_finite.should_skip(step, values):
            self.optimizer.step()
        return values | {RATE_NAME: self.optimizer.param_groups[0]["lr"]}

    def save(self, step: int) -> None:
        """Before the student's checkpoint of the same number of finished steps; one more is kept than of those."""
        save_training(
            self.checkpoints, self.ddps, self.optimizer, self.schedule, self.mesh,
            position=TrainState(step=step), keep=self.cfg.keep_checkpoints + 1, is_main=self.is_main,
        )  # fmt: skip

    def load(self, step: int) -> None:
        """Go on beside the student's checkpoint of so many finished steps."""
        load_training(self.checkpoints, self.ddps, self.optimizer, self.schedule, self.mesh, step=step)
