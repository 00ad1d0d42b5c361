"""Runs that are stopped on the way, and what is compared with those of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.context import MODEL
from compactlm_nemo.workflow import owner

BEFORE_DISTILL = ("teacher", "tokens", "score", "search", "student")
"""Artifacts that a distillation needs."""


def copy_artifacts(source: Path, target: Path, artifacts: Sequence[str] = BEFORE_DISTILL) -> Path:
    """Make a run that has these artifacts of another."""
    for artifact in artifacts:
        shutil.copytree(source / artifact, target / artifact)
    return target


def logged_steps(run: Path, stage: str = "distill") -> int:
    """Return the lines of a training's metrics so far."""
    path = run / "progress" / stage / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@contextmanager
def held(run: Path) -> Iterator[int]:
    """Stop the process that owns a run's folder (SIGSTOP) for the body, so that a tiny run does not end meanwhile."""
    pid = int(json.loads((run / owner.FILE).read_text())["pid"])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def wait_for_pending(pid: int, number: signal.Signals, seconds: float) -> None:
    """Wait until a signal has reached a stopped process, which takes it when it goes on."""
    end = time.monotonic() + seconds
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)$", status, re.MULTILINE)
        if any(int(bits, 16) >> (number - 1) & 1 for bits in pending):
            return
        assert time.monotonic() < end, f"process {pid} was not sent {number.name} within {seconds:g} s"
        time.sleep(0.1)


def equal_weights(one: Path, other: Path) -> bool:
    """Whether two artifacts hold bitwise the same model."""
    sources = [CheckpointSource(folder, Dims.load(folder / MODEL)) for folder in (one, other)]
    names = sources[0].shapes
    return names == sources[1].shapes and all(torch.equal(sources[0](name), sources[1](name)) for name in names)
