"""Takes the beginnings of documents out of token files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from compactlm_nemo.data.windows import TokenStream
from compactlm_nemo.errors import DataError


def document_beginnings(prefixes: Sequence[Path], num: int, length: int, bos: int | None = None) -> Tensor:
    """Return the first tokens of documents, of the corpora in turn: int64 ``[n, length]``, 1 <= n <= num.

    Args:
        prefixes: `PREFIX.bin` and `PREFIX.idx` of each corpus.
        num: Documents, fewer where there are fewer with more than `length` tokens.
        length: Tokens of a beginning.
        bos: Stands in front of each, as one of its tokens, where the document does not have it itself.
    Raises:
        DataError: no document is long enough.
    """
    by_corpus = [_beginnings(prefix, num, length, bos) for prefix in prefixes]
    in_turn = [each for row in zip_longest(*by_corpus) for each in row if each is not None]
    if not in_turn:
        raise DataError(
            f"evaluate.continuations.prompt_tokens={length}: no held-out document has more tokens; lower it."
        )
    return torch.stack(in_turn[:num])


def _beginnings(prefix: Path, num: int, length: int, bos: int | None) -> list[Tensor]:
    tokens = TokenStream(prefix).ids
    index = IndexedDataset(str(prefix), mmap=False).index
    bounds = numpy.concatenate([[0], numpy.cumsum(index.sequence_lengths, dtype=numpy.int64)])[index.document_indices]
    found: list[Tensor] = []
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        if end - first > length and len(found) < num:
            ids = torch.from_numpy(tokens[first : first + length].astype(numpy.int64))
            if bos is not None and ids[0] != bos:
                ids = torch.cat([torch.tensor([bos]), ids[:-1]])
            found.append(ids)
    return found
