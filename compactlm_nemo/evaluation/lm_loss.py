"""Language-model loss of a model on held-out windows, under any layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.distill.linear_kd import linear_ce
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import context_share, forward_each, micro_batches
from compactlm_nemo.parallel.collectives import last_stage_total
from compactlm_nemo.parallel.groups import Mesh


@dataclass(frozen=True, kw_only=True)
class LMLoss:
    """Mean loss in nats a token, the tokens it was measured on, and forward tokens a second over all ranks."""

    loss_nats: float
    tokens: int
    tokens_per_second: float


def evaluate_lm_loss(
    model: Any,
    dims: Dims,
    mesh: Mesh,
    windows_NT: Tensor,
    *,
    micro_batch: int,
    chunk_tokens: int,
    progress: Callable[[int], None],
) -> LMLoss:
    """Mean over all predicted tokens of `windows_NT` `[N, S + 1]`; equal on every rank. Collective.

    Data-parallel ranks take every dp-th window; sum and count are reduced, so any number of windows is exact.
    """
    mine = windows_NT[mesh.dp_rank :: mesh.dp_size]
    batches = micro_batches(mine, micro_batch)

    def loss_of(idx: int, hidden_SBH: Tensor) -> Tensor:
        labels = context_share(batches[idx][:, 1:], mesh).T.flatten()
        progress(len(batches[idx]) * mesh.dp_size)
        per_token = linear_ce(
            hidden_SBH.flatten(0, 1),
            model.head_weight,
            labels,
            torch.ones_like(labels, dtype=torch.float32),
            chunk_tokens=chunk_tokens,
            vocab_size=dims.vocab_size,
            vocab_start=mesh.tp_rank * model.head_weight.shape[0],
            tp_group=mesh.tp_group,
        )
        return per_token.double().sum()

    model.eval()
    start = time.perf_counter()
    sums = forward_each(model, mesh, [batch[:, :-1] for batch in batches], loss_of)
    total = torch.tensor(
        [float(sum(sums)), float(mine[:, 1:].numel() // mesh.cp_size)], dtype=torch.float64, device=mine.device
    )
    total = last_stage_total(total, mesh)
    seconds = time.perf_counter() - start
    tokens = int(total[1])
    return LMLoss(loss_nats=float(total[0]) / tokens, tokens=tokens, tokens_per_second=tokens / seconds)
