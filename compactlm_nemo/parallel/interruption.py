"""Asked to stop, by a signal or by the end of a job's time, a run saves at its next boundary and ends on all ranks.

A boundary is the end of a training step, of a part of a scoring pass, of a stage: `stop_if_asked` is called there on
every rank. Whatever rank was asked, all learn of it there and stop at the same place. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed import ProcessGroup

from compactlm_nemo.config.failures import TRY_AGAIN
from compactlm_nemo.errors import Interrupted
from compactlm_nemo.parallel.collectives import greatest, host_group
from compactlm_nemo.parallel.hang import beat
from compactlm_nemo.parallel.world import is_main_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

TIME_IS_UP = 1000
"""Stands for a signal where the job's time ends."""

LEAST_MARGIN = 60.0
"""Seconds before the end of a job at which a run stops at the latest."""


_STARTED = time.time()
"""When this process was young."""


class _Asked:
    """What this process has been asked, and by when it must have stopped."""

    def __init__(self) -> None:
        self.number = 0
        self.deadline: float | None = None
        self.longest_save = self.longest_block = 0.0
        self.last_boundary: float | None = None
        self.group: ProcessGroup | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if is_main_rank() and not self.number:
            again = "; once more ends at once" if number == signal.SIGINT else ""
            os.write(2, f"{signal.Signals(number).name}: stopping where work can be saved{again}\n".encode())
        self.number = number

    def is_late(self) -> bool:
        """Whether the next block and a save might not end before the deadline."""
        if self.deadline is None:
            return False
        needed = max(LEAST_MARGIN, 2 * self.longest_save + 1.5 * self.longest_block + LEAST_MARGIN / 2)
        return time.time() + needed > self.deadline


_asked = _Asked()


@contextmanager
def listening(deadline: float | None) -> Iterator[None]:
    """Take signals as requests to stop while the body runs; once the process group is there.

    Args:
        deadline: Seconds since the epoch at which this job ends, None for a job without end.
    """
    global _asked
    _asked, handlers = _Asked(), {}
    _asked.deadline = deadline
    _asked.group = host_group()
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, _asked.note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def boundary(save_is_due: bool = False) -> tuple[int, bool]:
    """Return, equal on every rank, by which signal one was asked to stop, and whether a save is due on one. Collective.

    The signal is 0 without a request, and `TIME_IS_UP` near the end of a job by the main rank's clock.
    """
    beat()
    now = time.monotonic()
    if _asked.last_boundary is not None:
        _asked.longest_block = max(_asked.longest_block, now - _asked.last_boundary)
    number = _asked.number or (TIME_IS_UP if is_main_rank() and _asked.is_late() else 0)
    number, is_due = greatest([number, int(save_is_due)], _asked.group)
    _asked.last_boundary = time.monotonic()
    return number, bool(is_due)


def stop_if_asked(state: str) -> None:
    """End the run on every rank when any was asked to stop. Collective.

    Args:
        state: What is on disk by now, for the user.
    Raises:
        Interrupted: with the exit code of the signal, or 75 for the end of a job's time.
    """
    number, _ = boundary()
    if number:
        raise interrupted(number, state)


def interrupted(number: int, state: str) -> Interrupted:
    """Return the error that ends a run which was asked to stop by this signal."""
    if number == TIME_IS_UP:
        return Interrupted(f"the job's time is nearly up: {state}; the same command goes on.", TRY_AGAIN)
    return Interrupted(f"{signal.Signals(number).name}: {state}; the same command goes on.", 128 + number)


def on_any_rank(flag: bool) -> bool:
    """Return, equal on every rank, whether the flag is set on one; no device is waited for. Collective."""
    return bool(greatest([int(flag)], _asked.group)[0])


def note_save(seconds: float) -> None:
    """Take notice of a save that took so long, or takes by now, for which time must be left at the end of a job."""
    _asked.longest_save = max(_asked.longest_save, seconds)


@contextmanager
def saving() -> Iterator[None]:
    """Mark that a save holds up training: that time is no part of a block."""
    start = time.monotonic()
    yield
    if _asked.last_boundary is not None:
        _asked.last_boundary += time.monotonic() - start


def job_deadline(limit_minutes: float | None) -> float | None:
    """Return when this process must have ended, seconds since the epoch: by `run.time_limit`, else by Slurm's word."""
    if limit_minutes is not None:
        return _STARTED + 60 * limit_minutes
    word = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(word) if word.isdigit() else None
