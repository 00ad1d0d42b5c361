"""Commands on the device under test, each a process of its own: a process has one device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support import commands

CPU = {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
"""Variables by which a process sees no GPU, and compiles no C++ for minutes."""


def start(words: list[str], log: Path, changes: dict[str, str] | None = None) -> Callable[[], int]:
    """Start `python WORDS` with changed variables; the function that is returned waits for its exit code.

    Where a GPU is, the process is no fork: CUDA cannot be used in a fork of a process that has asked for a device.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(changes or {})}
    if not torch.cuda.is_available():
        fork = commands.start(words, log, log.with_suffix(".err"), env=env)

        def end() -> int:
            fork.join()
            assert fork.exitcode is not None
            return fork.exitcode

        return end
    with log.open("w") as file:
        command_line = [sys.executable, *words]
        return subprocess.Popen(command_line, cwd=commands.ROOT, env=env, stdout=file, stderr=subprocess.STDOUT).wait


def written(*logs: Path) -> str:
    """The ends of what processes wrote, for a failure's message."""
    files = [file for log in logs for file in (log, log.with_suffix(".err")) if file.is_file()]
    return "\n".join(file.read_text()[-1500:] for file in files)
