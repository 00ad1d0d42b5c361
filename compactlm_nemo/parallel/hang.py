"""A rank that stalls is named, and the run ends so that its job can be queued again.

Every rank of a training waits for the others, so when one hangs all do. After `run.hang_minutes` without a heart-beat
each rank writes where it is into `run.dir/faults`; who has written nothing, or waits for no other rank, is the culprit.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compactlm_nemo.config.failures import FAULTS, TRY_AGAIN, tell_exit_code
from compactlm_nemo.parallel.world import is_main_rank, launch_rank, launch_world_size

GRACE_SECONDS = 5.0
"""Time that the other ranks have to write where they are."""

_WAITING_IN = ("distributed_c10d.py", "p2p_communication.py", "collectives.py", "param_and_grad_buffer.py")
"""Files whose functions wait for other ranks."""


@dataclass
class _Heart:
    """When this rank gave its last sign of life, and what it was to do then."""

    last: float = 0.0
    what: str = "start"


_heart = _Heart()


def beat(what: str | None = None) -> None:
    """Tell that this rank is alive, and what it does from now on."""
    _heart.last = time.monotonic()
    if what is not None:
        _heart.what = what


@contextmanager
def watched(run_dir: Path, minutes: float | None, hosts: list[str]) -> Iterator[None]:
    """End the process when the body gives no heart-beat for so many minutes; None watches nothing.

    Args:
        hosts: Name of every rank's host.
    """
    if minutes is None:
        yield
        return
    done = threading.Event()
    beat()
    main = threading.get_ident()
    watch = threading.Thread(target=_watch, args=(run_dir, 60 * minutes, hosts, main, done), daemon=True, name="hang")
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def _watch(run_dir: Path, seconds: float, hosts: list[str], main: int, done: threading.Event) -> None:
    while not done.wait(min(seconds / 10, 10)):
        if time.monotonic() - _heart.last > seconds:
            _give_up(run_dir, seconds, hosts, main)


def _give_up(run_dir: Path, seconds: float, hosts: list[str], main: int) -> None:
    """Write where this rank is, say on one rank which one hangs, and end the process."""
    frames = traceback.extract_stack(sys._current_frames()[main])
    folder = run_dir / FAULTS
    begin = time.time()
    waits = any(frame.filename.endswith(_WAITING_IN) for frame in frames[-6:])
    at = frames[-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = f"{'waits' if waits else 'works'} {_heart.what} {at.filename}:{at.lineno} {at.name}\n"
        (folder / f"hang-rank{launch_rank()}.txt").write_text(text + "".join(traceback.format_list(frames)))
    except OSError as error:
        print(f"error: {folder} cannot be written ({error.strerror})", file=sys.stderr)
    time.sleep(GRACE_SECONDS if is_main_rank() else 2 * GRACE_SECONDS)  # the main rank speaks, if it lives
    culprits = _culprits(folder, begin - seconds / 2, hosts)
    named = "; ".join(culprits) or "every rank waits for another"
    prefix = "" if is_main_rank() else f"rank {launch_rank()} on {socket.gethostname()}: "
    print(
        f"{prefix}error: no progress for {seconds / 60:g} min (run.hang_minutes): {named}; stacks are in {folder}, and "
        "the same command goes on from the last checkpoint.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    tell_exit_code(TRY_AGAIN)
    os._exit(TRY_AGAIN)


def _culprits(folder: Path, since: float, hosts: list[str]) -> list[str]:
    """Return what is known of the ranks that gave no sign, or do not wait for another."""
    found = []
    for rank in range(launch_world_size()):
        host = hosts[rank] if rank < len(hosts) else "an unknown host"
        path = folder / f"hang-rank{rank}.txt"
        try:
            is_new = path.stat().st_mtime >= since
            first = path.read_text().partition("\n")[0] if is_new else ""
        except OSError:
            first = ""
        if not first:
            found.append(f"rank {rank} on {host} gives no sign of life")
        elif first.startswith("works"):
            found.append(f"rank {rank} on {host} is in {first.removeprefix('works ')}")
    return found
