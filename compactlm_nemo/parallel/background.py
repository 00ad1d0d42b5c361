"""Work beside the step: threads that read, decode and encode while the device computes, and copies it goes on during.

Closing a pool waits for the work under way and drops the rest, so no thread outlives its stage (`contextlib.closing`).
What work raises is raised where its result is taken.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import BoundedSemaphore, Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from compactlm_nemo.parallel.devices import device

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

MOST_WORKERS = 8
"""Threads of a pool, beyond which Python's lock is what they wait for."""


def num_workers() -> int:
    """Return the threads that a rank may keep busy: its share of the cores that the ranks of this machine may use."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks))


class Workers:
    """A pool of threads that see this process's device.

    Args:
        num: Threads.
        most_pending: Calls of `submit` beyond those whose results are there; one more waits. None never waits.
    """

    def __init__(self, num: int, *, most_pending: int | None = None) -> None:
        self._threads = ThreadPoolExecutor(num, initializer=partial(_use_device, device()))
        self._room = None if most_pending is None else BoundedSemaphore(most_pending)

    def submit(self, work: Callable[..., T], *args: Any) -> Future[T]:
        """Begin the work; wait before that while too much is pending."""
        if self._room is None:
            return self._threads.submit(work, *args)
        self._room.acquire()
        future = self._threads.submit(work, *args)
        future.add_done_callback(self._release)
        return future

    def _release(self, _: Future[Any]) -> None:
        assert self._room is not None
        self._room.release()

    def close(self) -> None:
        """Drop work that has not begun, and return when the rest is done."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _use_device(of_process: torch.device) -> None:
    """Let a thread see the device; it starts on device 0, where its first pinned tensor would make a context."""
    if of_process.type == "cuda":
        torch.cuda.set_device(of_process)


class ReadAhead(Generic[K, T]):
    """Reads what has been announced before it is asked for, in the order of the announcements, a bounded part at once.

    Args:
        read: Called in a thread for each key.
        ahead: Keys that are read, or have been read and not been taken, at any time.
    """

    def __init__(self, read: Callable[[K], T], *, workers: int, ahead: int) -> None:
        self._read, self._ahead = read, ahead
        self._workers = Workers(workers)
        self._coming: OrderedDict[K, None] = OrderedDict()
        self._begun: dict[K, Future[T]] = {}
        self._lock = Lock()

    def expect(self, keys: Iterable[K]) -> None:
        """Announce keys that will be taken after those announced before; a known key keeps its place."""
        with self._lock:
            self._coming |= {key: None for key in keys if key not in self._begun and key not in self._coming}
            self._begin()

    def take(self, key: K) -> T:
        """Return what was read, and begin with the next; what `read` raised is raised here.

        A key that was not announced voids all announcements, whose order it has left.
        """
        with self._lock:
            if key not in self._begun and key not in self._coming:
                self._begun.clear()
                self._coming.clear()
            self._coming.pop(key, None)
            future = self._begun.pop(key, None) or self._workers.submit(self._read, key)
            self._begin()
        return future.result()

    def close(self) -> None:
        """Return when no thread is left."""
        self._workers.close()

    def _begin(self) -> None:
        while self._coming and len(self._begun) < self._ahead:
            key, _ = self._coming.popitem(last=False)
            self._begun[key] = self._workers.submit(self._read, key)


def pinned(tensor: Tensor) -> Tensor:
    """Return the tensor, of the CPU, in memory from which a GPU copies while it computes; without CUDA as it is."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def to_device(tensor: Tensor) -> Tensor:
    """Return the pinned tensor on this process's device; nothing waits for the copy but work behind it."""
    return tensor.to(device(), non_blocking=True)


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; the function that is returned waits for the copy and returns it."""
    if not tensor.is_cuda:
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
