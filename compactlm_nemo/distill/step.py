"""One distillation step: the teacher's forward-only pass, then the student's forward and backward schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.distill.hidden_states import ALPHA, HiddenStateLoss
from compactlm_nemo.distill.teacher import Batch, NoTeacher, Teacher
from compactlm_nemo.losses.linear_kd import linear_kd
from compactlm_nemo.losses.logit_losses import weighted_losses
from compactlm_nemo.losses.targets import Targets
from compactlm_nemo.losses.vocabulary import Head
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import context_share, positions_of
from compactlm_nemo.parallel.collectives import last_stage_total
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.optimizer import finish_gathering
from compactlm_nemo.training.tracker import LM_LOSS, LOSS, TEACHER_LM_LOSS


def term_names(loss: LossConfig) -> list[str]:
    """W&B names of the loss terms, means over the tokens of the global batch: the loss, its parts, both LM losses."""
    return [LOSS, *(f"train/kd_{name}" for name in weighted_losses(loss)), LM_LOSS, TEACHER_LM_LOSS]


def forward_backward(
    students: list[Any],
    teacher: Teacher,
    dims: Dims,
    mesh: Mesh,
    batches: list[Batch],
    *,
    loss: LossConfig,
    temperature: float,
    chunk_tokens: int,
    hidden_loss: HiddenStateLoss | None = None,
) -> dict[str, float]:
    """Accumulate the gradient of the mean loss over the global batch and return the loss terms. Collective.

    Args:
        students: Megatron DDP around each chunk of the student; their gradients are zeroed here.
        teacher: Says what the student should; asked once, before the student's schedule starts.
        batches: This data-parallel rank's micro-batches.
        hidden_loss: Losses between hidden states, to be added.
    Returns:
        What `term_names` names and `train/tokens`, reduced over data parallel, equal on every rank; with hidden-state
        losses each of them, and alpha.
    """
    for student in students:
        student.zero_grad_buffer()
    if hidden_loss is not None:
        hidden_loss.listen()
    targets_of: list[Targets | None] = [*teacher.targets(batches)] or [None] * len(batches)
    finish_gathering(students)
    tokens = [batch.tokens_BT for batch in batches]
    size, length = tokens[0].shape[0], tokens[0].shape[1] - 1

    def step(iterator: Iterator[tuple[int, Tensor, Targets | None]], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        idx, tokens_BT, targets = next(iterator)
        if hidden_loss is not None:
            hidden_loss.on_student(idx)
        inputs_BS = context_share(tokens_BT[:, :-1], mesh)
        hidden = model(inputs_BS, positions_of(inputs_BS), None)
        return hidden, partial(loss_of, tokens_BT, targets)

    def loss_of(tokens_BT: Tensor, targets: Targets | None, hidden_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert targets is not None  # they are where the loss is, on the last stage
        weight_VH = students[-1].module.head_weight
        labels_N = context_share(tokens_BT[:, 1:], mesh).T.flatten()
        terms = linear_kd(
            hidden_SBH.flatten(0, 1),
            Head.on_mesh(weight_VH, mesh, vocab_size=dims.vocab_size, chunk_tokens=chunk_tokens),
            targets,
            labels_N,
            torch.ones_like(labels_N, dtype=torch.float32),
            loss=loss,
            temperature=temperature,
            backward_once=True,
        )
        num_tokens = torch.full((), labels_N.numel(), dtype=torch.int, device=labels_N.device)
        sums = [terms.loss_sum.detach(), *terms.terms.values(), terms.ce_sum, terms.teacher_ce_sum, num_tokens]
        return terms.loss_sum, num_tokens, torch.stack([term.double() for term in sums])

    def run(*, forward_only: bool = False) -> dict[str, float]:
        sums = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[zip(count(), tokens, targets_of, strict=False) for _ in students],
            model=students,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=size,
            forward_only=forward_only,
        )
        return _reduced(sums, term_names(loss), mesh, tokens[0].device)

    if hidden_loss is None:
        terms = run()
    else:
        hidden_loss.deliver(tokens)
        terms = _with_hidden(run, hidden_loss, loss)
    if isinstance(teacher, NoTeacher):
        del terms[TEACHER_LM_LOSS]
    return terms


def _with_hidden(
    run: Callable[..., dict[str, float]], hidden_loss: HiddenStateLoss, loss: LossConfig
) -> dict[str, float]:
    """Terms of a step with hidden-state losses; the first also measures what alpha is to be."""

    def measured(*, forward_only: bool) -> tuple[dict[str, float], dict[str, float]]:
        hidden_loss.begin(is_measuring=forward_only)
        with torch.set_grad_enabled(not forward_only):  # Megatron's forward-only schedules keep the graph
            terms = run(forward_only=forward_only)
        return terms, hidden_loss.finish(terms["train/tokens"])

    def balance(terms: dict[str, float], states: dict[str, float]) -> None:
        logit_loss = sum(terms[f"train/kd_{name}"] * weight for name, (weight, _) in weighted_losses(loss).items())
        hidden_loss.balance(logit_loss, sum(states.values()))

    if hidden_loss.alpha is None:
        balance(*measured(forward_only=True))
    alpha = hidden_loss.alpha
    assert alpha is not None
    terms, states = measured(forward_only=False)
    balance(terms, states)
    return terms | {LOSS: terms[LOSS] + alpha * sum(states.values()), ALPHA: alpha} | states


def _reduced(sums: list[Tensor], names: list[str], mesh: Mesh, device: torch.device) -> dict[str, float]:
    """Sum over micro-batches and data-parallel ranks, divided by the token count; known on every stage."""
    total = torch.stack(sums).sum(dim=0) if sums else torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
    total = last_stage_total(total, mesh)
    tokens = float(total[-1])
    return {name: float(value) / tokens for name, value in zip(names, total, strict=False)} | {"train/tokens": tokens}
