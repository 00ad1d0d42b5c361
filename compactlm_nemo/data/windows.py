"""Draws samples at exact positions: the tokens of sample i depend on the seed and on i, not on layout or history.

A corpus is one stream of tokens, its documents one after another, cut into windows that overlap by one token: the last
target of a window is the first input of the next, so no target occurs twice. Where a corpus has a mask beside its
tokens (`data.answer_mask`), places that do not count are marked (`data.marks`), and windows without one that counts are
passed over. A model that was trained with a token in front of every text (BOS) sees it in place of a window's first
token, which is an input alone: targets stay what they are. Shapes: L tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from compactlm_nemo.config.data import LossOn
from compactlm_nemo.data.answer_mask import SUFFIX, AnswerMask
from compactlm_nemo.data.marks import mark
from compactlm_nemo.errors import DataError

_CHECK_TOKENS = 2**24
_GROW_SAMPLES = 4096


class Purpose(IntEnum):
    """A purpose has a random stream of its own under one seed."""

    training = 0
    calibration = 1


class Corpus(NamedTuple):
    """A corpus of a blend."""

    prefix: Path
    """`PREFIX.bin` and `PREFIX.idx`, and `PREFIX.mask` where not all tokens count."""
    share: float
    """Weight in the blend, > 0."""
    loss: LossOn = LossOn.answer
    """Which tokens count, where there is a mask."""
    bos: int | None = None
    """Token in place of the first of every window."""


class TokenStream:
    """Maps the tokens of a Megatron indexed dataset into memory, as one array.

    Args:
        prefix: `PREFIX.bin` and `PREFIX.idx`.
        vocab_size: Every token is checked against it, in one pass over the file; None skips the pass.
        loss: Whether the mask beside the tokens, if any, decides which of them count, or all do.
        bos: Takes the place of the first token of every window; None leaves it.
    """

    def __init__(
        self,
        prefix: Path,
        vocab_size: int | None = None,
        loss: LossOn = LossOn.answer,
        bos: int | None = None,
    ) -> None:
        self.prefix, self._bos = prefix, bos
        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise DataError(f"{prefix}{suffix} does not exist; tokenise the corpus first or correct the prefix.")
        try:
            index = IndexedDataset(str(prefix), mmap=False).index
            self.num_tokens = int(index.sequence_lengths.sum(dtype=numpy.int64))
            dtype = numpy.dtype(index.dtype)
        except Exception as error:  # Megatron asserts on a damaged index, NumPy and struct have errors of their own
            raise DataError(f"{prefix}.idx is damaged ({error}); delete it and tokenise the corpus again.") from error
        num_bytes = Path(f"{prefix}.bin").stat().st_size
        if num_bytes != self.num_tokens * dtype.itemsize:
            raise DataError(
                f"{prefix}.bin has {num_bytes} bytes, its index says {self.num_tokens * dtype.itemsize}; "
                "delete both and tokenise the corpus again."
            )
        if self.num_tokens == 0:
            raise DataError(f"{prefix} holds no tokens; give a corpus with text.")
        self._tokens = numpy.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
        has_mask = loss is LossOn.answer and Path(f"{prefix}{SUFFIX}").is_file()
        self._mask = AnswerMask(prefix, self.num_tokens) if has_mask else None
        self._numbers: dict[int, numpy.ndarray] = {}
        """Of windows of a length, those with a place that counts."""
        if vocab_size is not None:
            self._check_ids(vocab_size)

    @property
    def has_mask(self) -> bool:
        """Whether some places may not count."""
        return self._mask is not None

    @property
    def ids(self) -> numpy.ndarray:
        """All tokens, `[num_tokens]`, as they are in the file."""
        return self._tokens

    @property
    def last_token(self) -> int:
        """Return the token that ends the last document."""
        return int(self._tokens[-1])

    def num_windows(self, sequence_length: int) -> int:
        """Count the whole windows of `sequence_length` inputs and as many targets, of which some count."""
        if self._mask is None:
            return (self.num_tokens - 1) // sequence_length
        return len(self._that_count(self._mask, sequence_length))

    def window(self, idx: int, sequence_length: int) -> Tensor:
        """Return window idx: int64 ``[L + 1]``, tokens ``idx * L`` to ``(idx + 1) * L`` inclusive, with marks."""
        start = self.place_of(idx, sequence_length)
        tokens = torch.from_numpy(self._tokens[start : start + sequence_length + 1].astype(numpy.int64))
        if self._bos is not None:
            tokens[0] = self._bos
        if self._mask is not None:  # place s predicts token s + 1
            counts = self._mask.counts(start + 1, start + sequence_length + 1)
            tokens[:-1] = mark(tokens[:-1], torch.from_numpy(counts))
        return tokens

    def place_of(self, idx: int, sequence_length: int) -> int:
        """Return where the first token of window idx is in the file."""
        if self._mask is not None:
            idx = int(self._that_count(self._mask, sequence_length)[idx])
        return idx * sequence_length

    def _that_count(self, mask: AnswerMask, length: int) -> numpy.ndarray:
        """Return the numbers of the windows with a target that counts, found in one pass over the mask."""
        if length not in self._numbers:
            num, step = (self.num_tokens - 1) // length, max(1, _CHECK_TOKENS // length)
            found = [numpy.empty(0, dtype=numpy.int64)]
            for first in range(0, num, step):
                last = min(first + step, num)
                counts = mask.counts(first * length + 1, last * length + 1).reshape(last - first, length)
                found.append(first + numpy.flatnonzero(counts.any(axis=1)))
            self._numbers[length] = numpy.concatenate(found)
        return self._numbers[length]

    def _check_ids(self, vocab_size: int) -> None:
        for start in range(0, self.num_tokens, _CHECK_TOKENS):
            chunk = self._tokens[start : start + _CHECK_TOKENS]
            low, high = int(chunk.min()), int(chunk.max())
            if low < 0 or high >= vocab_size:
                raise DataError(
                    f"{self.prefix}.bin holds token {high if high >= vocab_size else low}, outside the model's "
                    f"vocabulary of {vocab_size}; tokenise the corpus with the model's own tokenizer."
                )


class Windows:
    """Blends corpora into an endless, seeded sequence of samples.

    Sample i belongs to the corpus with the largest deficit ``w_c * (i + 1) - taken_c`` (w normalised to sum 1, the
    first of equals), which keeps every corpus near its share at every length. Within a corpus, each pass takes every
    window once in an order of its own.

    Args:
        corpora: The blend; the order is part of the definition.
        sequence_length: L.
        seed: Decides the orders.
        vocab_size: Larger or negative tokens raise DataError here, once for all data.
        purpose: Calibration and training draw from separate random streams of one seed.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        sequence_length: int,
        seed: int,
        vocab_size: int | None = None,
        *,
        purpose: Purpose = Purpose.training,
    ) -> None:
        if not corpora:
            raise DataError("data.train is empty; give at least one corpus.")
        self.sequence_length = sequence_length
        self.streams = [_open_with_windows(c, sequence_length, vocab_size) for c in corpora]
        weights = numpy.array([corpus.share for corpus in corpora], dtype=numpy.float64)
        self._shares = weights / weights.sum()
        self._seed, self._purpose = seed, purpose
        self._orders: dict[int, tuple[int, numpy.ndarray]] = {}
        self._corpus_of = numpy.empty(0, dtype=numpy.int16)
        self._rank_of = numpy.empty(0, dtype=numpy.int64)
        self._taken = numpy.zeros(len(corpora), dtype=numpy.int64)
        self._skipped = [0] * len(corpora)

    @property
    def is_marked(self) -> bool:
        """Whether a corpus has places that do not count."""
        return any(stream.has_mask for stream in self.streams)

    def sample(self, i: int) -> Tensor:
        """Return sample i >= 0: int64 ``[L + 1]``, inputs ``[:-1]`` and targets ``[1:]``, with marks (`data.marks`)."""
        corpus_idx, rank = self.corpus_and_rank(i)
        stream, rank = self.streams[corpus_idx], rank + self._skipped[corpus_idx]
        pass_idx, position = divmod(rank, stream.num_windows(self.sequence_length))
        return stream.window(int(self._order(corpus_idx, pass_idx)[position]), self.sequence_length)

    def skip(self, counts: list[int]) -> None:
        """Pass over the first windows of each corpus, in its order; the blend stays as it is."""
        self._skipped = counts

    def corpus_and_rank(self, i: int) -> tuple[int, int]:
        """Return the corpus of sample i, and the number of samples of that corpus before sample i."""
        while len(self._corpus_of) <= i:
            self._grow()
        return int(self._corpus_of[i]), int(self._rank_of[i])

    def _grow(self) -> None:
        first = len(self._corpus_of)
        count = max(_GROW_SAMPLES, first)
        corpus_of, rank_of = numpy.empty(count, dtype=numpy.int16), numpy.empty(count, dtype=numpy.int64)
        for j in range(count):
            corpus_idx = int(numpy.argmax(self._shares * (first + j + 1) - self._taken))
            corpus_of[j], rank_of[j] = corpus_idx, self._taken[corpus_idx]
            self._taken[corpus_idx] += 1
        self._corpus_of = numpy.concatenate([self._corpus_of, corpus_of])
        self._rank_of = numpy.concatenate([self._rank_of, rank_of])

    def _order(self, corpus_idx: int, pass_idx: int) -> numpy.ndarray:
        cached = self._orders.get(corpus_idx)
        if cached is None or cached[0] != pass_idx:
            generator = numpy.random.default_rng([self._seed, self._purpose, corpus_idx, pass_idx])
            order = generator.permutation(self.streams[corpus_idx].num_windows(self.sequence_length))
            cached = self._orders[corpus_idx] = (pass_idx, order)
        return cached[1]


def heldout_windows(
    prefix: Path,
    sequence_length: int,
    max_tokens: int,
    *,
    vocab_size: int | None = None,
    loss: LossOn = LossOn.answer,
    bos: int | None = None,
) -> Tensor:
    """Return a corpus's first windows, in order: int64 ``[n, L + 1]``, n = min(max_tokens // L, all windows) >= 1."""
    if max_tokens < sequence_length:
        raise DataError(
            f"evaluate.tokens={max_tokens} is less than one window of data.sequence_length={sequence_length}; raise it."
        )
    stream = _open_with_windows(Corpus(prefix, 1.0, loss, bos), sequence_length, vocab_size)
    num_windows = min(max_tokens // sequence_length, stream.num_windows(sequence_length))
    return torch.stack([stream.window(idx, sequence_length) for idx in range(num_windows)])


def heldout_documents(
    prefix: Path, sequence_length: int, num_windows: int, *, document_end: int, loss: LossOn = LossOn.answer
) -> Tensor:
    """Return which document each target of a corpus's first windows belongs to: int64 ``[n, L]``.

    Documents are counted in the file, from 0; one ends with its `document_end`, wherever windows begin.
    """
    stream = TokenStream(prefix, loss=loss)
    starts = [stream.place_of(idx, sequence_length) for idx in range(num_windows)]
    is_end = stream.ids[: starts[-1] + sequence_length + 1] == document_end
    ends_before = numpy.cumsum(is_end) - is_end  # a document's end is its last token
    return torch.from_numpy(
        numpy.stack([ends_before[start + 1 : start + 1 + sequence_length] for start in starts]).astype(numpy.int64)
    )


def token_counts(corpora: Sequence[Corpus], vocab_size: int, most_tokens: int = _CHECK_TOKENS) -> Tensor:
    """Return how frequent each token is in a blend: float64 ``[vocab_size]``, of sum 1.

    Of every corpus its first `most_tokens` are counted, which for the order of the tokens is enough.
    """
    total = torch.zeros(vocab_size, dtype=torch.float64)
    for corpus in corpora:
        ids = TokenStream(corpus.prefix, loss=LossOn.all).ids[:most_tokens]
        counts = torch.from_numpy(numpy.bincount(ids, minlength=vocab_size)).double()
        total += corpus.share * counts / len(ids)
    return total / total.sum()


def calibration_windows(
    corpora: Sequence[Corpus], n: int, sequence_length: int, seed: int, *, vocab_size: int | None = None
) -> Tensor:
    """Draw n different windows of a blend: int64 ``[n, L]``; DataError when a corpus has fewer than its share of n.

    The draw is independent of the training order of the same seed.
    """
    windows = Windows(corpora, sequence_length, seed, vocab_size, purpose=Purpose.calibration)
    num_taken = [0] * len(windows.streams)
    for i in range(n):
        num_taken[windows.corpus_and_rank(i)[0]] += 1
    for stream, needed in zip(windows.streams, num_taken, strict=True):
        if needed > (num_windows := stream.num_windows(sequence_length)):
            raise DataError(
                f"{stream.prefix} has {num_windows} windows of {sequence_length} tokens, its share of "
                f"score.samples={n} is {needed}; lower score.samples or its weight, or add text."
            )
    return torch.stack([windows.sample(i)[:-1] for i in range(n)])


def validation_windows(
    corpora: Sequence[Corpus],
    skipped: int,
    n: int,
    sequence_length: int,
    seed: int,
    *,
    calibration: Sequence[Corpus] | None = None,
) -> Tensor:
    """Return the n windows after a blend's first `skipped` calibration windows, with targets: int64 ``[n, L + 1]``.

    A corpus with fewer windows starts again, with windows that served calibration.

    Args:
        calibration: Another blend that calibration drew from, which begins with the same corpora; None: this one.
    """
    windows = Windows(corpora, sequence_length, seed, purpose=Purpose.calibration)
    if calibration is None:
        return torch.stack([windows.sample(skipped + i) for i in range(n)])
    drawn = Windows(calibration, sequence_length, seed, purpose=Purpose.calibration)
    counts = numpy.bincount([drawn.corpus_and_rank(i)[0] for i in range(skipped)], minlength=len(calibration))
    windows.skip(counts[: len(corpora)].tolist())
    return torch.stack([windows.sample(i) for i in range(n)])


def _open_with_windows(corpus: Corpus, sequence_length: int, vocab_size: int | None) -> TokenStream:
    prefix = corpus.prefix
    stream = TokenStream(prefix, vocab_size, corpus.loss, corpus.bos)
    if stream.num_windows(sequence_length) == 0:
        if stream.num_tokens > sequence_length:
            raise DataError(f"{prefix} has no answer in a window of data.sequence_length={sequence_length}; add some.")
        raise DataError(
            f"{prefix} has {stream.num_tokens} tokens, less than one window of data.sequence_length={sequence_length} "
            "and its target; add text or shorten the window."
        )
    return stream
