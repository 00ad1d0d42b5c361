"""Micro-batches of a training step, drawn from the one seeded order of samples.

Shape suffixes: B samples, T tokens of a sample and its last label, S + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.models.forward import micro_batches
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.mesh import Mesh


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    tokens_BT: Tensor
    """``[B, S + 1]`` token ids."""
    samples: Sequence[int]
    """Numbers of the B samples in the training order."""


def step_batches(sample: Callable[[int], Tensor], batch: int, cfg: DistillConfig, mesh: Mesh) -> list[Batch]:
    """Return this rank's micro-batches of global batch number `batch`.

    Batch k holds samples k * global_batch ... of the seeded order, whatever the layout; rank r takes every dp-th.
    """
    first = batch * cfg.global_batch
    numbers = range(first + mesh.dp_rank, first + cfg.global_batch, mesh.dp_size)
    tokens = micro_batches(torch.stack([sample(number) for number in numbers]).to(device()), cfg.micro_batch)
    return [Batch(part, numbers[i * cfg.micro_batch :][: len(part)]) for i, part in enumerate(tokens)]
