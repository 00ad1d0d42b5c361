"""The id of the largest logit, the lowest of equals, over ranks that share the vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from compactlm_nemo.losses.vocabulary import Head, VocabShard
from tests.support.ranks import run_ranks

VOCAB, ROWS, TOKENS = 9, 16, 200


def case() -> tuple[Tensor, Tensor, list[int]]:
    """Few distinct values, so that most rows have several largest; padding that would be the largest of all."""
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randint(-1, 2, (TOKENS, 2), generator=generator).float()
    weight_VH = torch.randint(-1, 2, (ROWS, 2), generator=generator).float()
    weight_VH[VOCAB:] = 100.0
    ids = []
    for token in hidden_NH.tolist():
        logits = [sum(a * b for a, b in zip(token, row, strict=True)) for row in weight_VH[:VOCAB].tolist()]
        ids.append(logits.index(max(logits)))
    return hidden_NH, weight_VH, ids


def _matches(rank: int, world: int) -> None:
    hidden_NH, weight_VH, ids = case()
    rows = ROWS // world  # with 4 ranks the last holds padding alone
    shard = VocabShard(VOCAB, rank * rows, dist.group.WORLD)
    head = Head(weight_VH[rank * rows : (rank + 1) * rows], shard, chunk_tokens=7)
    assert head.likeliest_ids(hidden_NH).tolist() == ids


def test_the_lowest_of_equal_ids_on_one_rank() -> None:
    hidden_NH, weight_VH, ids = case()
    assert Head(weight_VH, VocabShard(VOCAB), chunk_tokens=7).likeliest_ids(hidden_NH).tolist() == ids
    assert len(set(ids)) > 3


def test_the_lowest_of_equal_ids_over_ranks(tmp_path: Path) -> None:
    run_ranks(_matches, 4, tmp_path)
