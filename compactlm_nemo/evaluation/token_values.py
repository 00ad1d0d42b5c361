"""Measures each prediction of held-out windows: its loss, the likeliest token, and the KL from a teacher's prediction.

Teacher and student are never on the device together. Of the teacher stay its final hidden states, on the host, and its
output weights, with which a student's pass makes the teacher's logits again, a chunk of tokens at a time.

Shape suffixes: W windows, T tokens of a window, S places (T - 1), B samples of a batch, N tokens of a batch on this
rank, H width, G teacher width, V vocabulary rows of this rank, F fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.data.marks import counts_of
from compactlm_nemo.evaluation.lm_loss import LMLoss, evaluate_lm_loss
from compactlm_nemo.losses.linear_kd import linear_kd
from compactlm_nemo.losses.targets import TeacherHead
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import DataParallelSamples, targets_of
from compactlm_nemo.models.layout import context_positions
from compactlm_nemo.parallel.collectives import last_stage_total


class TeacherStates(NamedTuple):
    """`TeacherStates` are what a student is compared with, of one text; none of both before the last stage."""

    hidden: list[Tensor]
    """``[S / cp, B, G]`` of each batch of this rank, on the host: final normed hidden states."""
    weight_VG: Tensor | None
    """The teacher's output weights, on the device."""


class TokenValues(NamedTuple):
    """`TokenValues` hold what was measured at each place of each window; on the CPU, equal on every rank."""

    loss_WS: Tensor
    """Language-model loss in nats, float64; 0 where the prediction does not count."""
    top_WS: Tensor
    """Token with the largest logit, int64, the lowest of equals; 0 where the prediction does not count."""
    kl_WS: Tensor | None
    """KL(teacher || model) at temperature 1 in nats, float64; None of the teacher itself."""


def host_states(model: ModelChunks, windows_WT: Tensor, *, micro_batch: int) -> list[Tensor]:
    """Return empty memory on the host for the final hidden states of this rank's batches; none before the last stage.

    It is pinned where there is CUDA, so that a GPU copies into it while it computes.
    """
    mesh = model.mesh
    if not mesh.is_last_stage:
        return []
    config, length = model.plain()[0].config, (windows_WT.shape[1] - 1) // mesh.cp_size
    return [
        torch.empty(
            (length, len(batch), model.dims.hidden_size),
            dtype=config.params_dtype,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in DataParallelSamples(windows_WT, mesh, micro_batch).batches
    ]


@torch.no_grad()
def measure_tokens(
    model: ModelChunks,
    windows_WT: Tensor,
    states: list[Tensor],
    *,
    micro_batch: int,
    progress: Callable[[int], None],
    teacher: TeacherStates | None = None,
) -> tuple[LMLoss, TokenValues]:
    """Run a model once over held-out windows, and then compare its predictions with the teacher's. Collective.

    The speed in the result is that of the run alone, hidden states copied to the host included: the comparison comes
    after it, from these states, so that teacher and students are timed at equal work.

    Args:
        windows_WT: ``[W, S + 1]``, with marks (`data.marks`), equal on every rank.
        states: Of `host_states`; afterwards they hold the model's.
        teacher: What the teacher left of the same windows; None for the teacher itself.
    """
    mesh, losses = model.mesh, dict[int, Tensor]()

    def keep(idx: int, hidden_SBH: Tensor, losses_N: Tensor) -> None:
        states[idx].copy_(hidden_SBH, non_blocking=True)
        losses[idx] = losses_N

    result = evaluate_lm_loss(model, windows_WT, micro_batch=micro_batch, progress=progress, visit=keep)
    share = DataParallelSamples(windows_WT, mesh, micro_batch)
    num_windows, length = windows_WT.shape[0], windows_WT.shape[1] - 1
    fields_FWS = torch.zeros(
        2 if teacher is None else 3, num_windows, length, dtype=torch.float64, device=windows_WT.device
    )
    places_S = context_positions(length // mesh.cp_size, mesh.cp_rank, mesh.cp_size, windows_WT.device)
    for idx, state_SBH in enumerate(states):
        hidden_SBH = _on_device(state_SBH, windows_WT)
        hidden_NH = hidden_SBH.flatten(0, 1)
        values = [losses[idx], model.head().likeliest_ids(hidden_NH)]
        if teacher is not None:
            values.append(
                _kl(model, hidden_NH, share.batches[idx], _on_device(teacher.hidden[idx], windows_WT), teacher)
            )
        values_FSB = torch.stack([value_N.double().view(hidden_SBH.shape[:2]) for value_N in values])
        num, first = share.num_local(idx), idx * micro_batch * mesh.dp_size + mesh.dp_rank
        # Sample p of rank r is window p dp + r; repetitions stand behind the others.
        own_FBS = fields_FWS[:, first :: mesh.dp_size][:, :num]
        own_FBS[..., places_S] = values_FSB[..., :num].transpose(1, 2)
    # Each place is one rank's, the others have 0 there.
    counts_WS = counts_of(windows_WT[:, :-1]).cpu()
    loss_WS, top_WS, *kl = (torch.where(counts_WS, field_WS, 0) for field_WS in last_stage_total(fields_FWS, mesh))
    return result, TokenValues(loss_WS, top_WS.long(), kl[0] if kl else None)


def _on_device(state_SBH: Tensor, like: Tensor) -> Tensor:
    """Return hidden states of the host in memory of their own on the device; nothing waits for the copy."""
    return torch.empty_like(state_SBH, device=like.device).copy_(state_SBH, non_blocking=True)


def _kl(
    model: ModelChunks, hidden_NH: Tensor, tokens_BT: Tensor, teacher_SBG: Tensor, teacher: TeacherStates
) -> Tensor:
    """Return ``[N]``, KL(teacher || model) of each prediction of a batch."""
    assert teacher.weight_VG is not None  # the last stage has it
    targets = TeacherHead(teacher_SBG.flatten(0, 1), teacher.weight_VG)
    labels_N, mask_N = targets_of(tokens_BT, model.mesh)
    losses = linear_kd(hidden_NH, model.head(), targets, labels_N, mask_N, loss=LossConfig(), keep_values=True)
    assert losses.values_LN is not None
    return losses.values_LN[0]
