"""Pools of threads: bounded, in order, silent about nothing, and gone when they are left."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future
from contextlib import closing

import pytest
import torch

from compactlm_nemo.parallel.background import ReadAhead, Workers, num_workers, to_host

WAIT = 10.0
"""Seconds after which a test that waits for a thread gives up."""


def eventually(is_so: object) -> bool:
    """Whether a condition, a function, comes true."""
    end = time.monotonic() + WAIT
    while not is_so() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.002)
    return bool(is_so())  # type: ignore[operator]


class Gate:
    """Work that ends when the gate is opened, and notes what has begun."""

    def __init__(self) -> None:
        self.is_open, self.begun = threading.Event(), list[int]()

    def __call__(self, key: int) -> int:
        self.begun.append(key)
        assert self.is_open.wait(WAIT)
        return key * key


def test_reading_ahead_begins_in_order_and_holds_no_more_than_it_may() -> None:
    gate = Gate()
    ahead = ReadAhead(gate, workers=1, ahead=3)
    ahead.expect(range(5))
    ahead.expect([3, 4, 5, 6])  # known keys keep their place
    gate.is_open.set()
    assert eventually(lambda: gate.begun == [0, 1, 2])
    time.sleep(0.05)
    assert gate.begun == [0, 1, 2]  # read, not taken: no more may begin
    assert ahead.take(0) == 0
    assert eventually(lambda: gate.begun == [0, 1, 2, 3])
    assert [ahead.take(key) for key in range(1, 7)] == [1, 4, 9, 16, 25, 36]
    assert gate.begun == list(range(7))  # each once
    ahead.close()


def test_a_key_that_was_not_announced_is_read_and_voids_the_announced_order() -> None:
    gate = Gate()
    gate.is_open.set()
    ahead = ReadAhead(gate, workers=2, ahead=2)
    ahead.expect([1, 2, 3, 4])
    assert ahead.take(9) == 81
    ahead.expect([10, 11])
    assert eventually(lambda: {10, 11} <= set(gate.begun))  # what was announced before takes no room
    assert ahead.take(10) == 100 and 4 not in gate.begun
    ahead.close()


def test_what_a_thread_raises_is_raised_where_its_result_is_taken_and_only_there() -> None:
    def read(key: int) -> int:
        if key == 2:
            raise ValueError("sample 2 is damaged")
        return key

    ahead = ReadAhead(read, workers=1, ahead=4)
    ahead.expect([1, 2, 3])
    assert ahead.take(1) == 1
    with pytest.raises(ValueError, match="^sample 2 is damaged$"):
        ahead.take(2)
    assert ahead.take(3) == 3
    ahead.expect([2])
    ahead.close()  # nobody asked for it


def test_no_thread_outlives_its_pool() -> None:
    before = set(threading.enumerate())
    gate = Gate()
    with closing(Workers(2)) as workers:
        jobs = [workers.submit(gate, i) for i in range(5)]
        assert eventually(lambda: len(gate.begun) == 2)
        assert len(set(threading.enumerate()) - before) == 2
        threading.Timer(0.05, gate.is_open.set).start()
    assert eventually(lambda: set(threading.enumerate()) <= before)
    assert [job.result() for job in jobs[:2]] == [0, 1] and len(gate.begun) == 2  # what had not begun was dropped
    with pytest.raises(CancelledError):
        jobs[-1].result()


def test_submitting_waits_while_too_much_is_pending() -> None:
    gate, submitted = Gate(), list[Future[int]]()
    with closing(Workers(1, most_pending=2)) as workers:
        thread = threading.Thread(target=lambda: submitted.extend(workers.submit(gate, i) for i in range(4)))
        thread.start()
        assert eventually(lambda: len(gate.begun) == 1)
        time.sleep(0.05)
        assert thread.is_alive()
        gate.is_open.set()
        thread.join(WAIT)
        assert [job.result() for job in submitted] == [0, 1, 4, 9]


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(24)))
    for ranks, threads in ((1, 8), (4, 6), (8, 3), (100, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert num_workers() == threads


def test_a_tensor_of_the_host_is_there_without_a_copy() -> None:
    tensor = torch.arange(3)
    assert to_host(tensor)() is tensor
