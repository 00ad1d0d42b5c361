"""The KL between a student and its teacher on held-out windows, under any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.distill.teacher import Teacher
from compactlm_nemo.losses.linear_kd import linear_kd, masked
from compactlm_nemo.losses.targets import Targets
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import DataParallelSamples, forward_each, targets_of
from compactlm_nemo.models.layout import context_positions
from compactlm_nemo.parallel.collectives import last_stage_total
from compactlm_nemo.training.batches import Batch

GROUP = 8
"""Micro-batches whose teacher states are held at once."""

MOST_RANGES = 8
"""Ranges of positions whose KL is told apart."""


class KDLoss(NamedTuple):
    """Held-out losses, means over the predictions that count, in nats."""

    lm_loss: float
    """Student's language-model loss."""
    kl: float
    """KL(teacher || student) at temperature 1."""
    kl_from: dict[int, float]
    """First position of a range -> the KL over its positions, which reach to the next range's first; without ranges
    where no prediction counts."""


@torch.no_grad()
def evaluate_kd_loss(
    student: ModelChunks,
    teacher: Teacher,
    windows_NT: Tensor,
    *,
    micro_batch: int,
) -> KDLoss:
    """Measure both losses over predictions of `windows_NT` `[N, S + 1]` that count; equal on every rank. Collective.

    Data-parallel ranks take every dp-th window and run in step; repetitions do not count, so the means are exact for
    any number of windows.
    """
    mesh = student.mesh
    share = DataParallelSamples(windows_NT, mesh, micro_batch)
    length = windows_NT.shape[1] - 1
    num_ranges = min(MOST_RANGES, length)
    places_S = context_positions(length // mesh.cp_size, mesh.cp_rank, mesh.cp_size, windows_NT.device)
    ranges_S = places_S * num_ranges // length
    student.eval()
    sums = torch.zeros(3 + 2 * num_ranges, dtype=torch.float64, device=windows_NT.device)
    for first in range(0, len(share.batches), GROUP):
        batches = share.batches[first : first + GROUP]
        targets = teacher.targets([Batch(batch, ()) for batch in batches])

        def visit(idx: int, hidden_SBH: Tensor, first: int = first, targets: Sequence[Targets] = targets) -> Tensor:
            hidden_NH = hidden_SBH.flatten(0, 1)
            labels_N, mask_N = targets_of(share.batches[first + idx], mesh)
            counts_B = share.counted(first + idx, mesh.dp_rank).to(labels_N.device, non_blocking=True)
            mask_N = mask_N * counts_B.float().expand(hidden_SBH.shape[:2]).flatten()
            losses = linear_kd(
                hidden_NH, student.head(), targets[idx], labels_N, mask_N, loss=LossConfig(), keep_values=True
            )
            assert losses.values_LN is not None
            ranges_N = ranges_S[:, None].expand(hidden_SBH.shape[:2]).flatten()
            kl_N = masked(losses.values_LN[0], mask_N)
            by_range = [
                mask_N.new_zeros(num_ranges).double().index_add(0, ranges_N, v.double()) for v in (kl_N, mask_N)
            ]
            whole = torch.stack([losses.ce_sum, losses.terms["forward_kl"], mask_N.sum()]).double()
            return torch.cat([whole, *by_range])

        sums += sum(forward_each(student, [batch[:, :-1] for batch in batches], visit), torch.zeros_like(sums))
    lm_loss, kl, tokens, *by_range = last_stage_total(sums, mesh).tolist()
    firsts = [-(-number * length // num_ranges) for number in range(num_ranges)]
    ranges = zip(firsts, by_range[:num_ranges], by_range[num_ranges:], strict=True)
    return KDLoss(lm_loss / tokens, kl / tokens, {first: kl / num for first, kl, num in ranges if num})
