"""Micro-batches of a training step, drawn from the one seeded order of samples.

Shape suffixes: B samples, T tokens of a sample and its last label, S + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.parallel.background import ReadAhead, pinned, to_device
from compactlm_nemo.parallel.mesh import Mesh


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    tokens_BT: Tensor
    """``[B, S + 1]`` token ids."""
    samples: Sequence[int]
    """Numbers of the B samples in the training order."""


class BatchFeed:
    """This rank's micro-batches of each global batch; the next are read and pinned by a thread while a step runs.

    Batch k holds samples k * global_batch ... of the seeded order, whatever the layout; rank r takes every dp-th.

    Args:
        sample: ``[S + 1]`` tokens of a sample of the training order; called by one thread alone.
    """

    def __init__(self, sample: Callable[[int], Tensor], cfg: DistillConfig, mesh: Mesh) -> None:
        self.sample, self.cfg, self.mesh = sample, cfg, mesh
        self._next: ReadAhead[int, Tensor] = ReadAhead(self._read, workers=1, ahead=1)

    def samples(self, batch: int) -> list[range]:
        """Return the numbers of the samples of each micro-batch of global batch `batch`."""
        first, size = batch * self.cfg.global_batch, self.cfg.micro_batch
        numbers = range(first + self.mesh.dp_rank, first + self.cfg.global_batch, self.mesh.dp_size)
        return [numbers[i : i + size] for i in range(0, len(numbers), size)]

    def batches(self, batch: int) -> list[Batch]:
        """Return the micro-batches of global batch `batch`, and begin to read the next."""
        tokens_NT = to_device(self._next.take(batch))
        self._next.expect([batch + 1])
        samples = self.samples(batch)
        parts = tokens_NT.split([len(numbers) for numbers in samples])
        return [Batch(tokens_BT, numbers) for tokens_BT, numbers in zip(parts, samples, strict=True)]

    def close(self) -> None:
        """Return when no thread is left."""
        self._next.close()

    def _read(self, batch: int) -> Tensor:
        numbers = [number for of_micro_batch in self.samples(batch) for number in of_micro_batch]
        return pinned(torch.stack([self.sample(number) for number in numbers]))
