"""Tokens that are drawn from a model's distribution over a sharded vocabulary.

Shape suffixes: N texts, V vocabulary rows of this rank, H hidden width, K blocks of rows, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.losses.vocabulary import Head, VocabShard, at_least_float32, cache_blocks, token_chunks
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_max, all_reduce_sum

_BLOCK = 256

Uniforms = Callable[[Tensor, int], Tensor]
"""(texts ``[N]``, attempt) -> float64 ``[N]`` in [0, 1) on the CPU, for each text and attempt another number."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler draws from the likeliest tokens, as few as have `top_p` of the probability, softmax(z / T).

    A token may be drawn where the tokens before it, in the order of falling probability and rising id, have less than
    `top_p` together; drawn is in proportion to the probabilities. Nothing is sorted: a token is drawn from the whole
    distribution, and drawn again where it is none of these, which is the same distribution.

    Source: Holtzman et al. 2020, arXiv:1904.09751.
    """

    temperature: float
    top_p: float
    never: Tensor
    """Ids that are not drawn, ``[n]`` int64 on the CPU; they count as tokens without probability."""

    def ids(self, head: Head, hidden_NH: Tensor, uniforms: Uniforms, also_never: Tensor, is_first_N: Tensor) -> Tensor:
        """Return ``[N]`` int64, a token for each text; equal on every rank that has equal numbers.

        Args:
            uniforms: Told the number of the text among these.
            also_never: Ids, ``[n]`` on the CPU, that are not drawn where `is_first_N` is true.
        """
        ids, numbers_N = [], torch.arange(len(hidden_NH))
        for chunk in token_chunks(len(hidden_NH), head.chunk_tokens):
            logits_NV = head.logits(hidden_NH[chunk])
            wide_NV = logits_NV.to(at_least_float32(logits_NV))
            self._forbid(wide_NV, head.shard, self.never, None)
            self._forbid(wide_NV, head.shard, also_never, is_first_N[chunk])
            for block in cache_blocks(logits_NV, head.shard):
                ids.append(self._draw(wide_NV[block], head.shard, uniforms, numbers_N[chunk][block]))
        return torch.cat(ids)

    def _forbid(self, logits_NV: Tensor, shard: VocabShard, ids: Tensor, rows_N: Tensor | None) -> None:
        columns = ids - shard.vocab_start
        columns = columns[(columns >= 0) & (columns < logits_NV.shape[1])].to(logits_NV.device)
        if rows_N is None:
            logits_NV[:, columns] = -torch.inf
        elif len(rows := rows_N.nonzero().flatten().to(logits_NV.device)):
            logits_NV[rows[:, None], columns] = -torch.inf

    def _draw(self, logits_NV: Tensor, shard: VocabShard, uniforms: Uniforms, numbers_N: Tensor) -> Tensor:
        """Draw from each row of logits, which are overwritten."""
        weights = _Weights(logits_NV.div_(self.temperature) if self.temperature != 1 else logits_NV, shard)
        ids_N = torch.empty(len(logits_NV), dtype=torch.long, device=logits_NV.device)
        left, attempt = torch.arange(len(logits_NV)), 0
        while len(left):
            places = left.to(ids_N.device)
            some = weights if len(left) == len(logits_NV) else weights.of(places)
            drawn_N, weight_N1 = some.at(uniforms(numbers_N[left], attempt).to(ids_N.device))
            ids_N[places] = drawn_N
            if self.top_p == 1:  # rounding may still draw a token without probability
                is_kept_N = weight_N1[:, 0] > 0
            else:
                is_kept_N = some.before(drawn_N, weight_N1) < self.top_p * some.total_N
            left, attempt = left[~is_kept_N.cpu()], attempt + 1
        return ids_N


class _Weights:
    """Probabilities times a constant of each row, of this rank's part of the vocabulary, and sums of their blocks."""

    def __init__(self, logits_NV: Tensor, shard: VocabShard) -> None:
        top_N = logits_NV.amax(dim=-1) if logits_NV.shape[1] else logits_NV.new_full(logits_NV.shape[:1], -torch.inf)
        e_NV = logits_NV.sub_(all_reduce_max(top_N, shard.tp_group)[:, None]).exp_()
        self._set(F.pad(e_NV, (0, -e_NV.shape[1] % _BLOCK)) if e_NV.shape[1] else e_NV.new_zeros(len(e_NV), 1), shard)

    def _set(self, e_NV: Tensor, shard: VocabShard) -> None:
        self._e_NV, self._shard = e_NV, shard
        blocks = e_NV.unflatten(1, (-1, _BLOCK)) if e_NV.shape[1] > 1 else e_NV[..., None]
        self._blocks_NK = blocks.sum(dim=-1).double().cumsum(dim=-1)
        own_N1 = self._blocks_NK[:, -1:]
        sums_NR = own_N1 if shard.tp_group is None else all_gather(own_N1.contiguous(), shard.tp_group, dim=-1)
        ends_NR = sums_NR.cumsum(dim=-1)
        self.total_N = ends_NR[:, -1]
        rank = 0 if shard.tp_group is None else shard.tp_group.rank()
        self._end_N, self._start_N = ends_NR[:, rank], ends_NR[:, rank - 1] if rank else torch.zeros_like(self.total_N)

    def of(self, rows: Tensor) -> _Weights:
        """Return those of some rows."""
        some = object.__new__(_Weights)
        some._set(self._e_NV[rows], self._shard)
        return some

    def at(self, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens at these places, 0 to 1, of the cumulative distribution, and their weights `[N, 1]`."""
        place_N = uniform_N * self.total_N
        is_here_N = (place_N >= self._start_N) & (place_N < self._end_N)
        place_N1 = (place_N - self._start_N)[:, None]
        block_N1 = torch.searchsorted(self._blocks_NK, place_N1, right=True).clamp_(max=self._blocks_NK.shape[1] - 1)
        before_N1 = torch.where(block_N1 > 0, self._blocks_NK.gather(1, (block_N1 - 1).clamp(min=0)), 0)
        columns_NC = block_N1 * _BLOCK + torch.arange(min(_BLOCK, self._e_NV.shape[1]), device=place_N.device)
        ends_NC = before_N1 + self._e_NV.gather(1, columns_NC).double().cumsum(dim=-1)
        inner_N1 = torch.searchsorted(ends_NC, place_N1, right=True).clamp_(max=ends_NC.shape[1] - 1)
        column_N1 = block_N1 * _BLOCK + inner_N1
        found = torch.stack([
            column_N1[:, 0].double() + self._shard.vocab_start, self._e_NV.gather(1, column_N1)[:, 0].double()
        ])  # fmt: skip
        ids_N, weight_N = all_reduce_sum(torch.where(is_here_N, found, 0), self._shard.tp_group)
        return ids_N.long(), weight_N.to(self._e_NV.dtype)[:, None]

    def before(self, ids_N: Tensor, weight_N1: Tensor) -> Tensor:
        """Return the sum of the weights that come before those of these tokens, in falling order; float64 `[N]`."""
        e_NV = self._e_NV
        larger_N = torch.where(e_NV > weight_N1, e_NV, 0).sum(dim=-1).double()
        is_equal_NV = e_NV == weight_N1
        columns_V = torch.arange(e_NV.shape[1], device=e_NV.device) + self._shard.vocab_start
        equal_N = (is_equal_NV & (columns_V < ids_N[:, None])).sum(dim=-1)
        return all_reduce_sum(larger_N + equal_N * weight_N1[:, 0].double(), self._shard.tp_group)
