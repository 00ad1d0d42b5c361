"""Peak memory of one pass on a CPU, as the kernel counts it.

A CPU has no allocator with a high-water mark, so the figure is the process's own: the peak of its resident set during
the pass minus the resident set before it. Two things make that mean "live tensors" rather than "history of the heap":

- the mark is reset (Linux: `5` into /proc/self/clear_refs) right before the pass, so loading the model does not count;
- the process runs with `ENVIRONMENT`, by which glibc gives every larger block its own mapping and returns it at once.
  That costs page faults, so memory is measured in processes where nothing is timed.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For the whole life of a process that measures memory; a threshold that is set no longer grows by itself."""


def peak_bytes(run: Callable[[], Any]) -> int:
    """What `run` needs at its peak beyond what is resident before it; first calls build caches, so warm up before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match[1]) * 1024
