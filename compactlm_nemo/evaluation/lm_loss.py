"""Measures the language-model loss of a model on held-out windows, under any layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compactlm_nemo.losses.linear_ce import linear_ce
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import DataParallelSamples, forward_each, targets_of
from compactlm_nemo.parallel.collectives import last_stage_total

Visit = Callable[[int, Tensor, Tensor], None]
"""Is shown, on the last stage alone, a batch's number, its final hidden states `[S / cp, B, H]`, and the masked loss of
each token, `[S / cp * B]`."""


@dataclass(frozen=True, kw_only=True)
class LMLoss:
    """A result has the mean loss in nats a token, the tokens whose prediction counts, and forward speed.

    The speed is of all ranks and of all tokens, whether their prediction counts or not.
    """

    loss_nats: float
    tokens: int
    tokens_per_second: float


def evaluate_lm_loss(
    model: ModelChunks,
    windows_NT: Tensor,
    *,
    micro_batch: int,
    progress: Callable[[int], None],
    visit: Visit = lambda idx, hidden_SBH, losses_N: None,
) -> LMLoss:
    """Average the loss over all predictions of `windows_NT` `[N, S + 1]` that count; equal on every rank. Collective.

    Data-parallel ranks take every dp-th window and run in step, as spread experts need; repetitions do not count and
    sum and count are reduced, so any number of windows is exact. What `visit` does is within the time that is measured.
    """
    mesh = model.mesh
    share = DataParallelSamples(windows_NT, mesh, micro_batch)

    def loss_of(idx: int, hidden_SBH: Tensor) -> tuple[Tensor, Tensor]:
        labels_N, mask_N = targets_of(share.batches[idx], mesh)
        progress(share.num_counted(idx))
        losses_N = linear_ce(hidden_SBH.flatten(0, 1), model.head(), labels_N, mask_N)
        visit(idx, hidden_SBH, losses_N)
        losses_SB, mask_SB = (x_N.view(hidden_SBH.shape[:2])[:, : share.num_local(idx)] for x_N in (losses_N, mask_N))
        return losses_SB.double().sum(), mask_SB.double().sum()

    model.eval()
    start = time.perf_counter()
    results = forward_each(model, [batch[:, :-1] for batch in share.batches], loss_of)
    sums = [float(sum(part)) for part in zip(*results, strict=True)] or [0.0, 0.0]
    total = last_stage_total(torch.tensor(sums, dtype=torch.float64, device=windows_NT.device), mesh)
    seconds = time.perf_counter() - start
    tokens = int(total[1])
    speed = windows_NT[:, 1:].numel() / seconds
    return LMLoss(loss_nats=float(total[0]) / tokens, tokens=tokens, tokens_per_second=speed)
