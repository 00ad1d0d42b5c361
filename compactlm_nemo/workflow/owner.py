"""A run's folder has one owner: the second command is told who works there."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from compactlm_nemo.errors import ConfigError
from compactlm_nemo.parallel.world import is_main_rank

FILE = ".owner"
"""In `run.dir`: host, process, job and time of who writes there; empty when nobody does."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_log = logging.getLogger(__name__)


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Own the folder for the body, on the main rank; the kernel gives it free when the process ends, however it does.

    Raises:
        ConfigError: another process owns it.
    """
    if not is_main_rank():
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / FILE).open("a+", encoding="utf-8") as file:
        _lock(run_dir, file)
        _write(file, _this_process())
        try:
            yield
        finally:
            _write(file, {})


def _lock(run_dir: Path, file: IO[str]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(_told(run_dir, _read(file))) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        owner = _read(file)
        _log.warning("%s: this file system has no locks; do not start a second command there.", run_dir)
        if owner and not _is_dead(owner):
            raise ConfigError(f"{_told(run_dir, owner)} Is it gone, delete {run_dir / FILE}.") from None


def _told(run_dir: Path, owner: dict[str, Any]) -> str:
    job = f", job {owner['job']}" if owner.get("job") else ""
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{job} since {owner.get('time', '?')}"
    return f"run.dir={run_dir} is in use by {who}; wait for it, or choose another run.dir."


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether a process of this host is gone; of another host nobody knows."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner.get("pid", 0)), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return int(owner["pid"]) == os.getpid()


def _this_process() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "time": now}


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        owner = json.loads(file.read() or "{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(file: IO[str], owner: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(owner) + "\n" if owner else "")
    file.flush()
