"""Forward passes through Megatron's pipeline schedule, and batches that fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from compactlm_nemo.data.marks import counts_of, ids_of
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.layout import context_positions
from compactlm_nemo.parallel.mesh import Mesh

Numbered = tuple[int | None, Tensor]
"""A batch and its number; None marks a repetition that only fills an interleaved schedule."""


def positions_of(tokens_BS: Tensor) -> Tensor:
    """Return `[B, S]` position ids 0..S-1; Megatron's rotary embedding works out those of a context-parallel rank."""
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)


def micro_batches(samples: Tensor, micro_batch: int) -> list[Tensor]:
    """Cut `[n, ...]` into batches of `micro_batch` samples; the last may be smaller."""
    return list(samples.split(micro_batch))


def context_share(tokens_BS: Tensor, mesh: Mesh) -> Tensor:
    """Return this context-parallel rank's part of every sequence, `[B, S / cp]`: see `context_positions`."""
    if mesh.cp_size == 1:
        return tokens_BS
    length = tokens_BS.shape[1] // mesh.cp_size
    return tokens_BS[:, context_positions(length, mesh.cp_rank, mesh.cp_size, tokens_BS.device)]


def sequence_share(x_SB: Tensor, mesh: Mesh) -> Tensor:
    """Return the part of this rank's places `[S / cp, B]` that it has under sequence parallelism; all of them else."""
    return x_SB.chunk(mesh.tp_size)[mesh.tp_rank] if mesh.is_sequence_parallel else x_SB


def targets_of(tokens_BT: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Return labels and float32 mask, `[S / cp * B]` each, of samples with their last label, in hidden states' order.

    The mask is 0 where a prediction is marked as one that does not count (`data.marks`).
    """
    labels_BS, counts_BS = ids_of(tokens_BT[:, 1:]), counts_of(tokens_BT[:, :-1])
    labels_N, counts_N = (context_share(x_BS, mesh).T.flatten() for x_BS in (labels_BS, counts_BS))
    return labels_N, counts_N.float()


def fill_schedule(numbered: list[Any], filler: Any, mesh: Mesh) -> list[Any]:
    """Append `filler` until there are as many batches as an interleaved pipeline takes: a multiple of its stages."""
    missing = -len(numbered) % mesh.pp_size if mesh.layout.virtual_stages > 1 else 0
    return numbered + [filler] * missing


@torch.no_grad()
def forward_each(
    chunks: ModelChunks,
    batches: list[Tensor],
    visit: Callable[[int, Tensor], Any],
    on_input: Callable[[int | None], None] | None = None,
) -> list[Any]:
    """Run token batches `[B, S]` forward only; the last stage calls `visit(batch_idx, hidden [S / cp, B, H])` for each.

    Pipeline stages exchange tensors of one shape per schedule call, so batches of another size get their own call.
    Returns what `visit` returned, in order; empty on other stages. `on_input` is told which batch a chunk starts, None
    for one that only fills the schedule.
    """
    results: list[Any] = []
    for _, group in groupby(enumerate(batches), key=lambda numbered: numbered[1].shape):
        numbered: list[Numbered] = list(group)
        results += _schedule(chunks, fill_schedule(numbered, (None, numbered[-1][1]), chunks.mesh), visit, on_input)
    return results


def _schedule(
    chunks: ModelChunks, numbered: list[Numbered], visit: Callable[[int, Tensor], Any], on_input: Any
) -> list[Any]:
    batch_size, length = numbered[0][1].shape

    def step(iterator: Iterator[Numbered], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        idx, tokens_BS = next(iterator)
        if on_input is not None:
            on_input(idx)
        tokens_BS = context_share(tokens_BS, chunks.mesh)
        hidden = model(tokens_BS, positions_of(tokens_BS), None)
        return hidden, lambda hidden, non_loss_data: None if idx is None else visit(idx, hidden)

    outcomes = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(numbered) for _ in chunks],
        model=chunks,
        num_microbatches=len(numbered),
        seq_length=length,
        micro_batch_size=batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return [outcome for (idx, _), outcome in zip(numbered, outcomes, strict=False) if idx is not None]


class DataParallelSamples:
    """This data-parallel rank's samples of `[N, ...]`, every dp-th, in batches.

    All ranks get equally many, so that they can run in step; where N does not divide, the last sample is repeated and
    does not count. The batches keep the marks of the samples (`data.marks`).
    """

    def __init__(self, samples: Tensor, mesh: Mesh, micro_batch: int) -> None:
        self.num, self.dp_size, self.micro_batch, self.rank = len(samples), mesh.dp_size, micro_batch, mesh.dp_rank
        missing = -self.num % self.dp_size
        padded = torch.cat([samples, samples[-1:].expand(missing, *samples.shape[1:])])
        self.batches = micro_batches(padded[self.rank :: self.dp_size], micro_batch)
        self.mesh = mesh
        self.is_marked = bool((samples < 0).any())  # waits for the device, once for all batches

    def counted(self, idx: int, dp_rank: int) -> Tensor:
        """Return `[B]`, whether each sample of a rank's batch `idx` is one of the N and no repetition; on the CPU."""
        return torch.arange(len(self.batches[idx])) < self._num_of(idx, dp_rank)

    def _num_of(self, idx: int, dp_rank: int) -> int:
        """Return samples of a rank's batch `idx` that are among the N: place p of rank r is sample ``p dp + r``."""
        of_rank = -(-(self.num - dp_rank) // self.dp_size)
        return max(0, min(len(self.batches[idx]), of_rank - idx * self.micro_batch))

    def places(self, idx: int) -> Tensor | None:
        """Return `[S / cp, B]`, which places of this context-parallel rank count; None where all of all samples do."""
        return context_share(counts_of(self.batches[idx]), self.mesh).T if self.is_marked else None

    def num_local(self, idx: int) -> int:
        """Return samples of this rank's batch `idx` that count: they are the leading ones."""
        return self._num_of(idx, self.rank)

    def num_counted(self, idx: int) -> int:
        """Return samples of batch `idx` over all data-parallel ranks."""
        return sum(self._num_of(idx, rank) for rank in range(self.dp_size))
