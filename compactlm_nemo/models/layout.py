"""How a model and its sequences are cut over ranks: layers over pipeline chunks, tokens over context-parallel ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def split_layers(num_layers: int, layout: ParallelConfig) -> list[int]:
    """Return layers of each chunk in pipeline order: in proportion to `parallel.pp_split`, at least one each.

    The largest remainders get the layers that whole shares leave over, the earlier chunk among equals.
    """
    parts = layout.pp_split or [1] * layout.num_chunks
    if num_layers < len(parts):
        raise ConfigError(
            f"parallel.pp={layout.pp} x parallel.virtual_stages={layout.virtual_stages} cannot split {num_layers} "
            "layers; lower either."
        )
    exact = [num_layers * part / sum(parts) for part in parts]
    counts = [max(1, math.floor(share)) for share in exact]
    by_need = sorted(range(len(parts)), key=lambda i: (counts[i] - exact[i], i))
    for step in range(abs(num_layers - sum(counts))):
        if sum(counts) < num_layers:
            counts[by_need[step % len(parts)]] += 1
        else:  # several chunks were raised to one layer
            counts[counts.index(max(counts))] -= 1
    return counts


def context_positions(length: int, rank: int, size: int, device: torch.device | None = None) -> Tensor:
    """Return `[length]` places in the sequence of a context-parallel rank's tokens, made on `device` (None: the CPU).

    The sequence is cut into `2 size` parts and rank r holds parts r and `2 size - 1 - r`, which gives every rank the
    same work under a causal mask. Megatron's rotary embedding and Transformer Engine's attention expect the same cut.
    """
    import torch  # here, because the rules of layouts are read before anything heavy is loaded

    if size == 1:
        return torch.arange(length, device=device)
    half = length // 2
    parts = torch.arange(2 * size * half, device=device).view(2 * size, half)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]])


def gathered_positions(length: int, size: int, device: torch.device | None = None) -> Tensor:
    """Return `[length * size]` places in the sequence of tokens that were gathered in the order of the ranks.

    Its `argsort` puts gathered tokens into the order of the sequence.
    """
    import torch

    return torch.cat([context_positions(length, rank, size, device) for rank in range(size)])
