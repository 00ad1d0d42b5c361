"""Starts each part in a process of its own, with an end after which the process and all its children are killed.

Parts are forked from a server that has imported what they need: that takes 10 seconds a part less. CUDA cannot be used
in a fork of a process that has asked for a device; where an import did that, the part starts as a fresh interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRELOAD = [
    "torch",
    "megatron.core",
    "transformers.models.auto",
    "compactlm_nemo.stages.training_run",
    "compactlm_nemo.stages.pruner",
    "bench.gpu.models",
]
"""What the parts import and what asks for no device."""


def run_part(part: str, seconds: float, *, dry: bool) -> dict[str, Any]:
    """Return `state` (done, failed, stopped), `seconds`, `error`, `figures` and `details` of a part."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "record.json", time.monotonic()
        process = multiprocessing.get_context("forkserver").Process(target=_child, args=(part, str(out), seconds, dry))
        try:
            process.start()
            process.join(seconds)
            state = "stopped" if process.is_alive() else "done" if process.exitcode == 0 else "failed"
        finally:
            _kill(process)
        result = json.loads(out.read_text()) if out.is_file() else {"figures": [], "details": {}}
        error = result["details"].pop("error", None)
    is_complete = result["details"].pop("is_complete", False)
    if state == "stopped":
        error = f"stopped after {seconds:.0f} s"
    elif not is_complete and error is None:
        state, error = "failed", f"ended with exit code {process.exitcode}"
    return {"state": state, "seconds": round(time.monotonic() - start, 1), "error": error} | result


def _child(part: str, out: str, seconds: float, dry: bool) -> None:
    start = time.monotonic()
    os.setsid()
    os.dup2(2, 1)  # standard output is the table's
    os.chdir(ROOT)
    import torch

    if torch.cuda._is_in_bad_fork():
        command = ["-m", "bench.gpu.worker", f"--part={part}", f"--out={out}", f"--seconds={seconds}"]
        os.execv(sys.executable, [sys.executable, *command, *(["--dry"] if dry else [])])
    from bench.gpu.worker import work

    os._exit(work(part, Path(out), seconds - (time.monotonic() - start), dry))


def _kill(process: Any) -> None:
    """End a process and its children, without waiting for one that the driver holds."""
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has ended, or has made no group yet
        if process.is_alive():
            process.kill()
    process.join(5)
