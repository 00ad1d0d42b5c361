"""Runs that are stopped on the way, and what is compared with those of an undisturbed run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.context import MODEL

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


def equal_weights(one: Path, other: Path) -> bool:
    """Whether two artifacts hold bitwise the same model."""
    sources = [CheckpointSource(folder, Dims.load(folder / MODEL)) for folder in (one, other)]
    names = sources[0].shapes
    return names == sources[1].shapes and all(torch.equal(sources[0](name), sources[1](name)) for name in names)
