"""Parts of bench.gpu as nobody wants them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.record import Record


def fails(record: Record, *, dry: bool) -> None:
    """Raise after a figure."""
    record.figure("before", 1.0)
    raise ValueError("no\nluck")


def dies(record: Record, *, dry: bool) -> None:
    """End without a word after a figure."""
    record.figure("before", 1.0)
    os._exit(7)


def hangs(record: Record, *, dry: bool) -> None:
    """Start a child that lives long, say who it is, and do not return."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    record.detail("child", child.pid)
    record.figure("before", 1.0)
    time.sleep(600)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
