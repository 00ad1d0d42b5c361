"""Batches that a thread reads ahead are those of the seeded order, whatever is asked for."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.errors import DataError
from compactlm_nemo.training.batches import BatchFeed

CONFIG = DistillConfig(steps=9, global_batch=6, micro_batch=2)


class Order:
    """A training order whose sample i is ``[i, i + 1000, ...]``, and which notes who reads."""

    def __init__(self, end: int = 10**6) -> None:
        self.read, self.threads, self.end = list[int](), set[int](), end

    def __call__(self, i: int) -> Tensor:
        self.read.append(i)
        self.threads.add(threading.get_ident())
        if i >= self.end:
            raise DataError(f"sample {i} is not there")
        return torch.tensor([i, i + 1000, i + 2000])


def feed_of(order: Order, dp_rank: int = 0, dp_size: int = 1) -> BatchFeed:
    mesh: Any = SimpleNamespace(dp_rank=dp_rank, dp_size=dp_size)
    return BatchFeed(order, CONFIG, mesh)


@pytest.mark.parametrize(("dp_rank", "dp_size"), [(0, 1), (1, 2), (2, 3)])
def test_batches_are_those_of_the_order_whatever_is_asked_for(dp_rank: int, dp_size: int) -> None:
    order = Order()
    feed = feed_of(order, dp_rank, dp_size)
    # On and on, back as after a resumed checkpoint, far ahead, and on.
    for batch in (0, 1, 2, 1, 2, 7, 8, 0):
        numbers = [6 * batch + i for i in range(6) if i % dp_size == dp_rank]
        of_micro_batches = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
        assert [list(part) for part in feed.samples(batch)] == of_micro_batches
        got = feed.batches(batch)
        assert [list(part.samples) for part in got] == of_micro_batches
        for part, want in zip(got, of_micro_batches, strict=True):
            assert part.tokens_BT.tolist() == [[i, i + 1000, i + 2000] for i in want]
    feed.close()
    assert len(order.threads) == 1 and order.threads != {threading.get_ident()}


def test_the_next_batch_is_read_while_the_step_runs_and_none_beyond() -> None:
    order, before = Order(), set(threading.enumerate())
    feed = feed_of(order)
    feed.batches(0)
    feed.close()  # waits for what is under way
    assert order.read in (list(range(6)), list(range(12)))  # dropped if it had not begun
    assert set(threading.enumerate()) <= before
    order = Order()
    feed = feed_of(order)
    for batch in range(3):
        feed.batches(batch)
    assert order.read[:18] == list(range(18)) and set(order.read) <= set(range(24))  # each once
    feed.close()


def test_a_sample_that_cannot_be_read_is_named_in_the_loop_when_its_batch_is_due() -> None:
    feed = feed_of(Order(end=12))
    feed.batches(0)
    feed.batches(1)  # the one after it fails in its thread
    with pytest.raises(DataError, match="^sample 12 is not there$"):
        feed.batches(2)
    feed.close()
