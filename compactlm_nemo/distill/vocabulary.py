"""Logits, log-probabilities and labels on the rows of the vocabulary that this rank holds.

Shape suffixes: N tokens, V vocabulary rows of this rank, H hidden width, M models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from compactlm_nemo.parallel.collectives import all_reduce_max, all_reduce_sum

NUM_BUFFERS = 6
"""Tensors `[N, V]` in wide dtype that a loss and its gradient hold at once."""


class LogProbs(NamedTuple):
    """One model on a chunk of tokens, at a temperature T."""

    log_prob_NV: Tensor
    """Log-probabilities at T."""
    shift_N1: Tensor
    """Logits divided by T, minus `log_prob_NV`."""
    plain_shift_N1: Tensor
    """Log-probabilities at T = 1 are ``T * log_prob_NV + plain_shift_N1``."""
    ce_N: Tensor
    """Language-model loss at T = 1, in nats; NaN where the label is no entry of the vocabulary."""


class Shard(NamedTuple):
    """The rows of the vocabulary that this rank holds; ids from `vocab_size` on are padding, and in no softmax."""

    vocab_size: int
    vocab_start: int
    tp_group: ProcessGroup | None

    def num_valid(self, weight_VH: Tensor) -> int:
        """Leading rows of the shard that are no padding; 0 where the whole shard is padding."""
        return min(max(self.vocab_size - self.vocab_start, 0), weight_VH.shape[0])

    def logits(self, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """Unpadded logits of this shard in wide dtype, in memory of their own."""
        logits_NV = hidden_NH @ weight_VH[: self.num_valid(weight_VH)].T
        return logits_NV.to(wide(logits_NV))

    def log_probs(self, logits: list[Tensor], labels_N: Tensor, temperature: float) -> list[LogProbs]:
        """Overwrites `logits`, `[N, V]` of each model. All models share one maximum and one sum over the ranks."""
        max_MN = all_reduce_max(torch.stack([_row_max(logits_NV) for logits_NV in logits]), self.tp_group)
        sums = []
        for logits_NV, max_N in zip(logits, max_MN, strict=True):
            plain_N = logits_NV.sub_(max_N[:, None]).exp().sum(dim=-1)
            label_N = self.at(logits_NV, labels_N[:, None])[:, 0]
            tempered_N = plain_N if temperature == 1 else logits_NV.div_(temperature).exp().sum(dim=-1)
            sums.append(torch.stack([plain_N, label_N, tempered_N]))
        totals_MKN = all_reduce_sum(torch.stack(sums), self.tp_group)
        is_label_N = (labels_N >= 0) & (labels_N < self.vocab_size)
        results = []
        for logits_NV, max_N, (plain_N, label_N, tempered_N) in zip(logits, max_MN, totals_MKN, strict=True):
            log_z_N, log_plain_N = tempered_N.log(), plain_N.log()
            results.append(
                LogProbs(
                    logits_NV.sub_(log_z_N[:, None]),
                    (log_z_N + max_N / temperature)[:, None],
                    (temperature * log_z_N - log_plain_N)[:, None],
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


def chunk_tokens(memory_bytes: int, rows: int) -> int:
    """Tokens whose logits of both models fit in so many bytes beside a head of `rows` rows of this rank; at least 1."""
    return max(1, memory_bytes // (NUM_BUFFERS * torch.float32.itemsize * rows))


def _row_max(logits_NV: Tensor) -> Tensor:
    if logits_NV.shape[-1] == 0:  # this rank holds padding only
        return logits_NV.new_full(logits_NV.shape[:1], -torch.inf)
    return logits_NV.amax(dim=-1)
