"""Forward passes through Megatron's pipeline schedule, and batches that fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor


def positions_of(tokens_BS: Tensor) -> Tensor:
    """`[B, S]` position ids 0..S-1."""
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)


def micro_batches(samples: Tensor, micro_batch: int) -> list[Tensor]:
    """Cut `[n, ...]` into batches of `micro_batch` samples; the last may be smaller."""
    return list(samples.split(micro_batch))


@torch.no_grad()
def forward_each(
    model: Any,
    batches: list[Tensor],
    visit: Callable[[int, Tensor], Any],
    on_input: Callable[[int], None] | None = None,
) -> list[Any]:
    """Run token batches `[B, S]` forward only; the last stage calls `visit(batch_idx, hidden [S, B, H])` for each.

    Pipeline stages exchange tensors of one shape per schedule call, so batches of another size get their own call.
    Returns what `visit` returned, in order; empty on other stages. `on_input` is told which batch a stage starts.
    """
    results: list[Any] = []
    for _, group in groupby(enumerate(batches), key=lambda numbered: numbered[1].shape):
        results += _schedule(model, list(group), visit, on_input)
    return results


def _schedule(
    model: Any, numbered: list[tuple[int, Tensor]], visit: Callable[[int, Tensor], Any], on_input: Any
) -> list[Any]:
    batch_size, length = numbered[0][1].shape

    def step(iterator: Iterator[tuple[int, Tensor]], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        idx, tokens_BS = next(iterator)
        if on_input is not None:
            on_input(idx)
        return model(tokens_BS, positions_of(tokens_BS), None), lambda hidden, non_loss_data: visit(idx, hidden)

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(numbered),
        model=model,
        num_microbatches=len(numbered),
        seq_length=length,
        micro_batch_size=batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
