"""Marks tell which predictions of a sample count: a token whose place does not count is stored as ``~id``, below 0.

Place s predicts the token at s + 1. The mark of that prediction is at token s, so a sample without its last label still
has the marks of all its places, and tokens of which all places count are as they always were. One tensor holds both:
where somebody forgets to take the mark off, the id is outside every vocabulary, and nothing goes on unnoticed.

Shape suffixes: S places, T tokens, S and the last label.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mark(tokens: Tensor, counts: Tensor) -> Tensor:
    """Return the ids, with a mark where `counts`, boolean of the same shape, is false."""
    return torch.where(counts, tokens, ~tokens)


def ids_of(tokens: Tensor) -> Tensor:
    """Return the ids in the vocabulary; of an id and its complement the one that is not negative."""
    return torch.maximum(tokens, ~tokens)


def counts_of(tokens: Tensor) -> Tensor:
    """Return whether the prediction at each place counts, boolean."""
    return tokens >= 0
