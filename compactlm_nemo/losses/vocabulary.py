"""Logits, log-probabilities and labels on the rows of the vocabulary that this rank holds.

Shape suffixes: N tokens, V vocabulary rows of this rank, H hidden width, M models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from compactlm_nemo.parallel.collectives import all_reduce_max, all_reduce_sum

NUM_BUFFERS = 3
"""Tensors `[N, V]` in wide dtype that a chunk holds at once: logits of both models, a product not yet widened."""


LEAST_MIB = 256
"""Memory for a chunk of any head, where nothing else is asked for."""


BLOCK_BYTES = 2**22
"""Logits that are compared at a time on a CPU: few enough that all that is made of them stays in its cache."""


class LogProbs(NamedTuple):
    """One model on a chunk of tokens, at a temperature T."""

    log_prob_NV: Tensor
    """Log-probabilities at T."""
    prob_NV: Tensor
    """Probabilities at T."""
    shift_N1: Tensor
    """Logits divided by T, minus `log_prob_NV`."""
    plain_shift_N1: Tensor
    """Log-probabilities at T = 1 are ``T * log_prob_NV + plain_shift_N1``."""
    ce_N: Tensor
    """Language-model loss at T = 1, in nats; NaN where the label is no entry of the vocabulary."""


@dataclass(frozen=True)
class VocabShard:
    """The rows of the vocabulary that this rank holds; ids from `vocab_size` on are padding, and in no softmax."""

    vocab_size: int
    vocab_start: int
    tp_group: ProcessGroup | None
    """Ranks that hold the other rows; None where this one holds all, which a group of one rank becomes."""

    def __post_init__(self) -> None:
        if self.tp_group is not None and self.tp_group.size() == 1:
            object.__setattr__(self, "tp_group", None)

    def num_valid(self, weight_VH: Tensor) -> int:
        """Leading rows of the shard that are no padding; 0 where the whole shard is padding."""
        return min(max(self.vocab_size - self.vocab_start, 0), weight_VH.shape[0])

    def logits(self, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """Unpadded logits of this shard in wide dtype, in memory of their own."""
        logits_NV = hidden_NH @ weight_VH[: self.num_valid(weight_VH)].T
        return logits_NV.to(wide(logits_NV))

    def log_probs(self, logits: list[Tensor], labels_N: Tensor, temperature: float) -> list[LogProbs]:
        """Of each model's `[N, V]`, which stay as they are. All models share one maximum and one sum over the ranks.

        Not by `log_softmax`, whose vectorised sum over the vocabulary is off by several roundings.
        """
        tops_MN = all_reduce_max(torch.stack([_row_max(logits_NV) for logits_NV in logits]), self.tp_group)
        shifted, sums = [], []
        for logits_NV, top_N in zip(logits, tops_MN, strict=True):
            x_NV = logits_NV - top_N[:, None]
            label_N = self.at(x_NV, labels_N[:, None])[:, 0]
            plain_N = None if temperature == 1 else x_NV.exp().sum(dim=-1)
            e_NV = x_NV.exp() if temperature == 1 else x_NV.div_(temperature).exp()
            own_N = e_NV.sum(dim=-1)
            sums.append(torch.stack([own_N if plain_N is None else plain_N, label_N, own_N]))
            shifted.append((x_NV, e_NV))
        results = []
        is_label_N = (labels_N >= 0) & (labels_N < self.vocab_size)
        totals = all_reduce_sum(torch.stack(sums), self.tp_group)
        for (x_NV, e_NV), top_N, (plain_N, label_N, own_N) in zip(shifted, tops_MN, totals, strict=True):
            log_own_N, log_plain_N = own_N.log(), plain_N.log()
            results.append(
                LogProbs(
                    x_NV.sub_(log_own_N[:, None]),
                    e_NV.div_(own_N[:, None]),
                    (log_own_N + top_N / temperature)[:, None],
                    (temperature * log_own_N - log_plain_N)[:, None],
                    torch.where(is_label_N, log_plain_N - label_N, torch.nan),
                )
            )
        return results

    def at(self, values_NV: Tensor, ids_NK: Tensor) -> Tensor:
        """``[N, K]``: entries of global ids where this shard holds them, else 0; their sum over ranks is the entry."""
        if values_NV.shape[-1] == 0:
            return values_NV.new_zeros(ids_NK.shape)
        places_NK, held_NK = self.places(ids_NK, values_NV.shape[-1])
        return torch.where(held_NK, values_NV.gather(-1, places_NK), 0)

    def add_at(self, values_NV: Tensor, ids_NK: Tensor, added_NK: Tensor) -> Tensor:
        """Adds to the entries of global ids, distinct in each row, that this shard holds; overwrites `values_NV`."""
        if values_NV.shape[-1] == 0:
            return values_NV
        places_NK, held_NK = self.places(ids_NK, values_NV.shape[-1])
        return values_NV.scatter_add_(-1, places_NK, torch.where(held_NK, added_NK.to(values_NV.dtype), 0))

    def places(self, ids_NK: Tensor, num_held: int) -> tuple[Tensor, Tensor]:
        """Column of each global id in this shard (any column if it is not here), and whether it is here."""
        local_NK = ids_NK - self.vocab_start
        return local_NK.clamp(0, num_held - 1), (local_NK >= 0) & (local_NK < num_held)


def wide(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def chunk_tokens(memory_mib: int | None, rows: int, width: int) -> int:
    """Tokens whose logits of both models fit in so much memory beside a head `[rows, width]` of this rank; at least 1.

    None takes half of the head's float32 gradient, and `LEAST_MIB` at least: every chunk is added to all of that
    gradient, which costs more than the chunk's own products where it has few tokens for its width.
    """
    row_bytes = rows * torch.float32.itemsize
    memory_bytes = max(LEAST_MIB * 2**20, row_bytes * width // 2) if memory_mib is None else memory_mib * 2**20
    return max(1, memory_bytes // (NUM_BUFFERS * row_bytes))


def blocks(logits_NV: Tensor, shard: VocabShard) -> Iterator[slice]:
    """Rows that are compared at a time: all, where every step is a kernel's start or a message to other ranks."""
    rows, row_bytes = logits_NV.shape[0], logits_NV.shape[1] * logits_NV.itemsize
    whole = shard.tp_group is not None or logits_NV.is_cuda
    return chunks(rows, rows if whole else max(1, BLOCK_BYTES // max(1, row_bytes)))


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices of at most so many tokens."""
    return (slice(start, start + chunk_tokens) for start in range(0, num_tokens, max(1, chunk_tokens)))


def _row_max(logits_NV: Tensor) -> Tensor:
    if logits_NV.shape[-1] == 0:  # this rank holds padding only
        return logits_NV.new_full(logits_NV.shape[:1], -torch.inf)
    return logits_NV.amax(dim=-1)
