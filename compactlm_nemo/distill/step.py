"""One distillation step: the teacher's forward-only pass, then the student's forward and backward schedule.

Shape suffixes: B samples, S tokens of a sample on this rank, T a sample's tokens and its last label, N tokens of a
micro-batch, H student width, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.distill.teacher import NoTeacher, Teacher
from compactlm_nemo.losses.linear_kd import linear_kd
from compactlm_nemo.losses.logit_losses import weighted_losses
from compactlm_nemo.losses.targets import Targets
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import context_share, positions_of, targets_of
from compactlm_nemo.parallel.collectives import last_stage_total
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.callbacks import Callback
from compactlm_nemo.training.optimizer import finish_gathering
from compactlm_nemo.training.tracker import LM_LOSS, LOSS, TEACHER_LM_LOSS


def term_names(loss: LossConfig) -> list[str]:
    """Return W&B names of the loss terms, means over the predictions of the global batch that count.

    They are the loss, its parts, and both models' LM losses.
    """
    return [LOSS, *(f"train/kd_{name}" for name in weighted_losses(loss)), LM_LOSS, TEACHER_LM_LOSS]


def forward_backward(
    students: ModelChunks,
    teacher: Teacher,
    batches: list[Batch],
    *,
    loss: LossConfig,
    temperature: float,
    callbacks: Sequence[Callback] = (),
) -> dict[str, float]:
    """Accumulate the gradient of the mean loss over the global batch and return the loss terms. Collective.

    Args:
        students: Megatron DDP around each chunk of the student; their gradients are zeroed here.
        teacher: The source of targets; it runs once, before the student's schedule starts.
        batches: This data-parallel rank's micro-batches.
        callbacks: Parts that may add losses inside the student and terms of theirs.
    Returns:
        What `term_names` names and `train/tokens`, the predictions that count, reduced over data parallel, equal on
        every rank, and the terms that callbacks add.
    """
    for student in students:
        student.zero_grad_buffer()
    for callback in callbacks:
        callback.before_teacher()
    targets = teacher.targets(batches)
    finish_gathering(students)
    student_pass = StudentPass(students, batches, targets, loss=loss, temperature=temperature, callbacks=callbacks)
    for callback in callbacks:
        callback.before_student(student_pass)
    terms = student_pass.run()
    for callback in callbacks:
        callback.after_student(student_pass, terms)
    if isinstance(teacher, NoTeacher):
        del terms[TEACHER_LM_LOSS]
    return terms


class StudentPass:
    """Megatron's schedule of the student over the micro-batches of a step, with the loss head behind its last stage.

    Args:
        targets: Of each micro-batch; empty before the last stage.
    """

    def __init__(
        self,
        students: ModelChunks,
        batches: list[Batch],
        targets: Sequence[Targets],
        *,
        loss: LossConfig,
        temperature: float,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.students, self.mesh, self.batches, self.targets = students, students.mesh, batches, targets
        self.loss, self.temperature = loss, temperature
        self.callbacks = callbacks

    def run(self, *, forward_only: bool = False) -> dict[str, float]:
        """Run the schedule and return the loss terms; without `forward_only` gradients are added up. Collective."""
        size, length = self.batches[0].tokens_BT.shape
        with torch.set_grad_enabled(not forward_only):  # Megatron's forward-only schedules keep the graph
            sums = get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=[iter(range(len(self.batches))) for _ in self.students],
                model=self.students,
                num_microbatches=len(self.batches),
                seq_length=length - 1,
                micro_batch_size=size,
                forward_only=forward_only,
            )
        return self._means(sums)

    def logit_loss(self, terms: dict[str, float]) -> float:
        """Return the weighted sum of those terms that compare logits with the teacher's."""
        return sum(terms[f"train/kd_{name}"] * weight for name, (weight, _) in weighted_losses(self.loss).items())

    def _forward(self, micro_batches: Iterator[int], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        """Run one chunk over the next micro-batch; return its output and the function that makes the loss of it."""
        idx = next(micro_batches)
        for callback in self.callbacks:
            callback.before_micro_batch(idx)
        inputs_BS = context_share(self.batches[idx].tokens_BT[:, :-1], self.mesh)
        return model(inputs_BS, positions_of(inputs_BS), None), partial(self._loss, idx)

    def _loss(self, idx: int, hidden_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return micro-batch `idx`'s summed loss, how many predictions count, and all sums that `_means` divides."""
        labels_N, mask_N = targets_of(self.batches[idx].tokens_BT, self.mesh)
        terms = linear_kd(
            hidden_SBH.flatten(0, 1),
            self.students.head(),
            self.targets[idx],
            labels_N,
            mask_N,
            loss=self.loss,
            temperature=self.temperature,
            backward_once=True,
        )
        num_tokens = mask_N.sum(dtype=torch.int)
        sums = [terms.loss_sum.detach(), *terms.terms.values(), terms.ce_sum, terms.teacher_ce_sum, num_tokens]
        return terms.loss_sum, num_tokens, torch.stack([term.double() for term in sums])

    def _means(self, sums: list[Tensor]) -> dict[str, float]:
        """Return loss terms and token count: sums over micro-batches and ranks, divided by the predictions that count.

        `sums` is empty before the last stage, which shares the means with all stages. Where no prediction of the
        global batch counts, all terms are 0, as the gradient is.
        """
        names = term_names(self.loss)
        nothing = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.batches[0].tokens_BT.device)
        total = last_stage_total(torch.stack(sums).sum(dim=0) if sums else nothing, self.mesh)
        tokens = float(total[-1])
        return {name: float(value) / max(tokens, 1.0) for name, value in zip(names, total, strict=False)} | {
            "train/tokens": tokens
        }
