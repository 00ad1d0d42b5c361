"""Logits, log-probabilities and labels on the rows of the vocabulary that this rank holds.

Shape suffixes: N tokens, V vocabulary rows of this rank, H hidden width, M models, K ids a token, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from compactlm_nemo.errors import ConfigError
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_max, all_reduce_sum

if TYPE_CHECKING:
    from compactlm_nemo.parallel.mesh import Mesh

NUM_BUFFERS = 3
"""Tensors `[N, V]` in wide dtype that a chunk holds at once: logits of both models, a product not yet widened."""


FUSED_BUFFERS = 2
"""The same for kernels, in the dtype of the product: logits of both models; the student's become their gradient."""


LEAST_MIB = 256
"""Memory for a chunk of any head, where nothing else is asked for."""


FUSED_LEAST_MIB = 1024
"""The same on a GPU: below about two thousand tokens the float32 gradient is read and written too often."""


TILE = 128
"""Tokens that a GPU's matrix product takes at a time."""


BLOCK_BYTES = 2**22
"""Logits that are compared at a time on a CPU: few enough that all that is made of them stays in its cache."""


class LogProbs(NamedTuple):
    """`LogProbs` holds the distributions of one model over the vocabulary, of a chunk of tokens, at a temperature T."""

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

    @property
    def scaled_logits_NV(self) -> Tensor:
        """The logits divided by T, in memory of their own."""
        return self.log_prob_NV + self.shift_N1


@dataclass(frozen=True)
class VocabShard:
    """A shard is the rows of the vocabulary that this rank holds; ids from `vocab_size` on are padding, in no softmax.

    Heads of several models that share a vocabulary share the shard.
    """

    vocab_size: int
    """Entries of the vocabulary without padding, over all ranks."""
    vocab_start: int = 0
    """Global id of row 0 of the shard."""
    tp_group: ProcessGroup | None = None
    """Ranks that hold the other rows; None where this one holds all, which a group of one rank becomes."""

    def __post_init__(self) -> None:
        if self.tp_group is not None and self.tp_group.size() == 1:
            object.__setattr__(self, "tp_group", None)

    def num_valid(self, weight_VH: Tensor) -> int:
        """Count the leading rows of the shard that are no padding; 0 where the whole shard is padding."""
        return min(max(self.vocab_size - self.vocab_start, 0), weight_VH.shape[0])

    def logits(self, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the unpadded logits of this shard, in the dtype of the product and memory of their own."""
        return hidden_NH @ weight_VH[: self.num_valid(weight_VH)].T

    def log_probs(self, logits: list[Tensor], labels_N: Tensor, temperature: float) -> list[LogProbs]:
        """Return the `LogProbs` of every model from its logits `[N, V]`, at least in float32, which stay as they are.

        All models share one maximum and one sum over the ranks. Not by `log_softmax`, whose vectorised sum over the
        vocabulary is off by several roundings.
        """
        tops_MN = all_reduce_max(torch.stack([_row_max(logits_NV) for logits_NV in logits]), self.tp_group)
        shifted, sums = [], []
        for logits_NV, top_N in zip(logits, tops_MN, strict=True):
            x_NV = logits_NV - top_N[:, None]
            label_N = self.at(x_NV, labels_N[:, None])[:, 0]
            plain_N = None if temperature == 1 else x_NV.exp().sum(dim=-1)
            e_NV = x_NV.exp() if temperature == 1 else x_NV.div_(temperature).exp()
            sum_N = e_NV.sum(dim=-1)
            sums.append(torch.stack([sum_N if plain_N is None else plain_N, label_N, sum_N]))
            shifted.append((x_NV, e_NV))
        results = []
        is_label_N = (labels_N >= 0) & (labels_N < self.vocab_size)
        totals = all_reduce_sum(torch.stack(sums), self.tp_group)
        for (x_NV, e_NV), top_N, (plain_N, label_N, sum_N) in zip(shifted, tops_MN, totals, strict=True):
            log_sum_N, log_plain_N = sum_N.log(), plain_N.log()
            results.append(
                LogProbs(
                    log_prob_NV=x_NV.sub_(log_sum_N[:, None]),
                    prob_NV=e_NV.div_(sum_N[:, None]),
                    shift_N1=(log_sum_N + top_N / temperature)[:, None],
                    plain_shift_N1=(temperature * log_sum_N - log_plain_N)[:, None],
                    ce_N=torch.where(is_label_N, log_plain_N - label_N, torch.nan),
                )
            )
        return results

    def likeliest_id(self, logits_NV: Tensor) -> Tensor:
        """Return ``[N]``, the global id of the largest logit over all ranks; the lowest id of equal logits."""
        if logits_NV.shape[-1] == 0:  # this rank holds padding only
            top_N, id_N = _row_max(logits_NV), logits_NV.new_zeros(logits_NV.shape[:1], dtype=torch.long)
        else:
            top_N, id_N = logits_NV.max(dim=-1)  # the first of equals, as torch promises
            id_N = id_N + self.vocab_start
        if self.tp_group is None:
            return id_N
        # Ranks hold the vocabulary in order, so the first rank with the largest has the lowest id.
        tops_NR, ids_NR = (all_gather(x_N[:, None], self.tp_group, dim=-1) for x_N in (top_N, id_N))
        return ids_NR.gather(-1, tops_NR.max(dim=-1, keepdim=True).indices)[:, 0]

    def ce_gradient(self, model: LogProbs, labels_N: Tensor, temperature: float) -> Tensor:
        """Return the ``[N, V]`` gradient of `model.ce_N` to the logits: ``softmax(z)_v - [v = label]`` at T = 1."""
        if temperature == 1:
            prob_NV = model.prob_NV.clone()
        else:
            prob_NV = (model.log_prob_NV * temperature).add_(model.plain_shift_N1).exp_()
        ones_N1 = torch.ones_like(labels_N, dtype=prob_NV.dtype)[:, None]
        return self.add_at(prob_NV, labels_N[:, None], -ones_N1)

    def at(self, values_NV: Tensor, ids_NK: Tensor) -> Tensor:
        """Return ``[N, K]``: entries of global ids in this shard, 0 for others; their sum over ranks is the entry."""
        if values_NV.shape[-1] == 0:
            return values_NV.new_zeros(ids_NK.shape)
        columns_NK, is_here_NK = self._columns(ids_NK, values_NV.shape[-1])
        return torch.where(is_here_NK, values_NV.gather(-1, columns_NK), 0)

    def add_at(self, values_NV: Tensor, ids_NK: Tensor, added_NK: Tensor) -> Tensor:
        """Add to the entries of global ids, distinct in each row, that lie in this shard; overwrites `values_NV`."""
        if values_NV.shape[-1] == 0:
            return values_NV
        columns_NK, is_here_NK = self._columns(ids_NK, values_NV.shape[-1])
        return values_NV.scatter_add_(-1, columns_NK, torch.where(is_here_NK, added_NK.to(values_NV.dtype), 0))

    def _columns(self, ids_NK: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
        """Return the column of each global id in this shard, any column if the id is elsewhere, and if it is here."""
        column_NK = ids_NK - self.vocab_start
        return column_NK.clamp(0, num_columns - 1), (column_NK >= 0) & (column_NK < num_columns)


@dataclass(frozen=True, eq=False)
class Head:
    """A head is this rank's rows of a model's output weights, where they lie in the vocabulary, and the chunk size."""

    weight_VH: Tensor
    """``[V, H]``, of the dtype of the hidden states. Rows whose id is >= ``vocab_size`` get zero gradient."""
    shard: VocabShard
    chunk_tokens: int
    """Tokens whose logits exist at the same time."""
    fused: bool | None = None
    """Whether the kernels of losses/fused.py compare the logits; None takes them on a GPU. For tests and benchmarks."""

    def __post_init__(self) -> None:
        if self.chunk_tokens <= 0:
            raise ConfigError(f"chunk_tokens={self.chunk_tokens} must be > 0; try 512.")

    @classmethod
    def on_mesh(cls, weight_VH: Tensor, mesh: Mesh, *, vocab_size: int, chunk_tokens: int) -> Head:
        """Return the head of a model whose output weights tensor parallelism splits into equally many rows a rank."""
        shard = VocabShard(vocab_size, mesh.tp_rank * weight_VH.shape[0], mesh.tp_group)
        return cls(weight_VH, shard, chunk_tokens)

    @property
    def num_valid(self) -> int:
        """The number of leading rows that are no padding."""
        return self.shard.num_valid(self.weight_VH)

    def is_fused(self, hidden_NH: Tensor) -> bool:
        """Whether kernels compare the logits of these hidden states; they compute in float32, so never in float64."""
        wanted = hidden_NH.is_cuda if self.fused is None else self.fused
        return wanted and hidden_NH.dtype != torch.float64

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return the unpadded logits ``[N, V]`` of this shard, in the dtype of the product and memory of their own."""
        return self.shard.logits(hidden_NH, self.weight_VH)

    def likeliest_ids(self, hidden_NH: Tensor) -> Tensor:
        """Return ``[N]``, the id of the largest logit of each token, chunk by chunk; equal on every rank."""
        chunks = token_chunks(len(hidden_NH), self.chunk_tokens)
        return torch.cat([self.shard.likeliest_id(self.logits(hidden_NH[rows])) for rows in chunks])


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """Return float32, or float64 for a float64 tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def chunk_tokens(
    memory_mib: int | None, rows: int, width: int, *, dtype: torch.dtype, device: torch.device | str
) -> int:
    """Return how many tokens' logits of both models fit in the memory, for a head `[rows, width]`; at least 1.

    None takes half of the head's float32 gradient, and `LEAST_MIB` or `FUSED_LEAST_MIB` at least: every chunk is added
    to all of that gradient, which costs more than the chunk's own products where it has few tokens for its width.
    """
    on_gpu = torch.device(device).type == "cuda" and dtype != torch.float64
    row_bytes = rows * torch.float32.itemsize
    least_mib = FUSED_LEAST_MIB if on_gpu else LEAST_MIB
    memory_bytes = max(least_mib * 2**20, row_bytes * width // 2) if memory_mib is None else memory_mib * 2**20
    tokens = memory_bytes // (FUSED_BUFFERS * rows * dtype.itemsize if on_gpu else NUM_BUFFERS * row_bytes)
    return max(1, tokens // TILE * TILE if on_gpu and tokens > TILE else tokens)


def token_chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Yield slices of at most `chunk_tokens` tokens."""
    return (slice(start, start + chunk_tokens) for start in range(0, num_tokens, max(1, chunk_tokens)))


def cache_blocks(logits_NV: Tensor, shard: VocabShard) -> Iterator[slice]:
    """Yield the tokens of a chunk that are compared at a time: as many as a CPU's cache holds all buffers of.

    On a GPU, or with other ranks, one block is the whole chunk: every step is a kernel's start, or a message.
    """
    num_tokens, row_bytes = logits_NV.shape[0], logits_NV.shape[1] * at_least_float32(logits_NV).itemsize
    is_whole = shard.tp_group is not None or logits_NV.is_cuda
    return token_chunks(num_tokens, num_tokens if is_whole else max(1, BLOCK_BYTES // max(1, row_bytes)))


def _row_max(logits_NV: Tensor) -> Tensor:
    if logits_NV.shape[-1] == 0:  # this rank holds padding only
        return logits_NV.new_full(logits_NV.shape[:1], -torch.inf)
    return logits_NV.amax(dim=-1)
