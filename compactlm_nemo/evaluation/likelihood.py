"""Measures how likely a model finds continuations of texts, as lm-eval does, on the mesh under any layout.

Shape suffixes: N texts, T tokens of a text with those that fill it up, S places (T - 1), B texts of a batch, H width,
M tokens of continuations in a batch on this rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compactlm_nemo.data.documents import DocumentEncoder
from compactlm_nemo.data.marks import mark
from compactlm_nemo.errors import DataError
from compactlm_nemo.losses.linear_ce import linear_ce
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import DataParallelSamples, forward_each, targets_of
from compactlm_nemo.parallel.collectives import last_stage_total
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.mesh import Mesh

ROUND = 32
"""Texts are filled up to a multiple of so many tokens, so that many share a shape and cross a pipeline together."""
_BATCH_TEXTS = 512


def no_bar(label: str, samples: int, tokens: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show no progress."""
    return nullcontext(lambda count: None)


class Pair(NamedTuple):
    """A pair is what stands in front, and what follows it and is measured."""

    context: str
    continuation: str
    where: str
    """File and line, for messages."""


class ScoredText(NamedTuple):
    """A text whose last tokens are measured."""

    ids: list[int]
    num_scored: int


@dataclass(frozen=True, kw_only=True)
class PairEncoder:
    """Turns pairs into tokens, as lm-eval's `_encode_pair` does.

    The continuation's tokens are those of the whole text behind as many as the context has alone, so that a token
    across the border counts as the continuation's; space at the end of a context goes to the continuation first.
    """

    documents: DocumentEncoder
    """Has the model's tokenizer."""
    start: int | None
    """Token in front of every text (`data.tokenizer.window_start`)."""
    max_positions: int
    """Longer texts lose tokens on the left."""

    def encode(self, pairs: Sequence[Pair]) -> list[ScoredText]:
        """Return the tokens of each pair.

        Raises:
            DataError: a continuation has no token of its own, or more than the model has positions, or a token is not
                in the vocabulary.
        """
        starts = range(0, len(pairs), _BATCH_TEXTS)
        return [text for start in starts for text in self._encode(pairs[start : start + _BATCH_TEXTS])]

    def _encode(self, pairs: Sequence[Pair]) -> list[ScoredText]:
        contexts = [pair.context.rstrip() for pair in pairs]
        context_ids = self.documents.plain_ids(contexts)
        whole_ids = self.documents.plain_ids([pair.context + pair.continuation for pair in pairs])
        return [self._text(*each) for each in zip(pairs, context_ids, whole_ids, strict=True)]

    def _text(self, pair: Pair, context: list[int], whole: list[int]) -> ScoredText:
        num_scored = len(whole) - len(context)
        if num_scored < 1:
            raise DataError(
                f"{pair.where} has the choice {pair.continuation.strip()!r}, which adds no token to its question; "
                "write it otherwise."
            )
        if num_scored > self.max_positions:
            raise DataError(
                f"{pair.where} has a choice of {num_scored} tokens, the model has {self.max_positions} positions; "
                "shorten it."
            )
        if max(whole) >= self.documents.num_tokens:
            raise DataError(
                f"{pair.where} gives token {max(whole)}, outside the vocabulary of {self.documents.num_tokens}; use "
                "the tokenizer that belongs to the model."
            )
        if self.start is not None and whole[0] != self.start:
            whole = [self.start, *whole]
        elif not context:  # something has to stand before the first prediction
            whole = [self._first(), *whole]
        return ScoredText(whole[-(self.max_positions + 1) :], num_scored)

    def _first(self) -> int:
        """Return what stands before a text without context: the tokenizer's BOS or EOS, as in lm-eval."""
        tokenizer = self.documents.tokenizer
        numbers = (tokenizer.bos_token_id, tokenizer.eos_token_id, self.documents.eod)
        return int(next(number for number in numbers if number is not None))


def padded_length(length: int, dims: Dims, mesh: Mesh) -> int:
    """Return the places that a text of `length` inputs is filled up to, which context and sequence parallelism split.

    A model whose rotation depends on a text's length (longrope) gets no text filled up across its border.
    """
    least = 2 * mesh.cp_size * mesh.tp_size if mesh.cp_size > 1 else mesh.tp_size
    padded = _up(length, math.lcm(ROUND, least))
    scaling = dims.rope_scaling or {}
    border: int | None = scaling.get("original_max_position_embeddings") if _has_border(scaling) else None
    return _up(length, least) if border is not None and length <= border < padded else padded


def _has_border(scaling: dict[str, object]) -> bool:
    return scaling.get("rope_type") == "longrope"


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@torch.no_grad()
def log_likelihoods(
    model: ModelChunks, texts: Sequence[ScoredText], *, batch_tokens: int, progress: Callable[[int], None]
) -> Tensor:
    """Return ``[N]`` float64 on the CPU: the log-likelihood of each text's last tokens in nats. Collective.

    ``sum_t log p(x_t | x_<t)`` over the `num_scored` last tokens, in float32 or wider by token. Texts of about one
    length are run together, filled up behind their end, where nothing that counts can see it. Equal on every rank.

    Args:
        batch_tokens: Most tokens of a batch on one rank; a longer text is a batch alone.
        progress: Is told of texts that are done.
    """
    mesh = model.mesh
    total_N = torch.zeros(len(texts), dtype=torch.float64, device=device())
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        by_length[padded_length(len(text.ids) - 1, model.dims, mesh)].append(number)
    model.eval()
    for length, numbers in sorted(by_length.items(), reverse=True):
        windows_NT = torch.stack([_window(texts[number], length + 1) for number in numbers])
        share = DataParallelSamples(windows_NT, mesh, max(1, batch_tokens // length))
        total_N += _sums(model, share, torch.tensor(numbers), len(texts), progress)
    return last_stage_total(total_N, mesh)


def _sums(
    model: ModelChunks, share: DataParallelSamples, numbers: Tensor, num_texts: int, progress: Callable[[int], None]
) -> Tensor:
    """Return ``[num_texts]`` float64, what this rank's part of texts of one length adds; `numbers` are the texts'."""
    total_N = torch.zeros(num_texts, dtype=torch.float64, device=device())
    own = numbers[share.rank :: share.dp_size].split(share.micro_batch)

    def visit(idx: int, hidden_SBH: Tensor) -> None:
        progress(share.num_counted(idx))
        if num := share.num_local(idx):
            total_N[own[idx].to(total_N.device)] = _scored_sums(model, share.batches[idx], hidden_SBH)[:num]

    forward_each(model, [batch[:, :-1].to(device()) for batch in share.batches], visit)
    return total_N


def _window(text: ScoredText, num_tokens: int) -> Tensor:
    """Return ``[num_tokens]``, the text filled up with token 0, of whose places those that are measured count."""
    ids = torch.tensor(text.ids)
    places = torch.arange(num_tokens)
    last = len(ids) - 1  # place s predicts token s + 1
    counts = (places >= last - text.num_scored) & (places < last)
    return mark(torch.nn.functional.pad(ids, (0, num_tokens - len(ids))), counts | (places == num_tokens - 1))


def _scored_sums(model: ModelChunks, tokens_BT: Tensor, hidden_SBH: Tensor) -> Tensor:
    """Return ``[B]`` float64, the summed log-probabilities that count of a batch in this context-parallel rank's part.

    Logits are made of those places alone, which are known on the CPU: the device need not be waited for.
    """
    labels, mask = targets_of(tokens_BT, model.mesh)
    rows = mask.nonzero()[:, 0]
    rows_M, labels_M, mask_M = (x.to(hidden_SBH.device) for x in (rows, labels[rows], mask[rows]))
    losses = hidden_SBH.new_zeros(mask.shape, dtype=torch.float64)
    if len(rows):
        losses[rows_M] = linear_ce(hidden_SBH.flatten(0, 1)[rows_M], model.head(), labels_M, mask_M).double()
    return -losses.view(hidden_SBH.shape[:2]).sum(0)
