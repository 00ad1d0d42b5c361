"""Training checkpoints: weights, optimizer, schedule, position and RNG, loadable in any layout.

A checkpoint counts only when `latest.json` names it; that file is replaced atomically after everything is on disk,
so a kill at any instant leaves the previous checkpoint in force.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from compactlm_nemo.artifacts import atomic_write_text
from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.checkpoint import sharding_metadata
from compactlm_nemo.parallel.collectives import barrier
from compactlm_nemo.parallel.groups import Mesh

LATEST = "latest.json"


def latest_step(folder: Path) -> int | None:
    """Steps finished at the newest complete checkpoint, None without one."""
    if not (folder / LATEST).is_file():
        return None
    return int(json.loads((folder / LATEST).read_text())["step"])


def _folder(root: Path, step: int) -> Path:
    return root / f"step_{step:07d}"


def _state(ddp: Any, optimizer: Any, schedule: Any, mesh: Mesh, step: int, is_loading: bool) -> dict[str, Any]:
    metadata = sharding_metadata(mesh)
    model_state = ddp.module.sharded_state_dict(metadata=metadata)
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata),
        "schedule": schedule.state_dict(),
        "step": step,
        "rng": torch.get_rng_state(),
    }


def save_training(
    root: Path, ddp: Any, optimizer: Any, schedule: Any, mesh: Mesh, *, step: int, keep: int, is_main: bool
) -> None:
    """Save after `step` finished steps and drop all but the newest `keep`. Collective."""
    target = _folder(root, step)
    if is_main:
        shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed while saving
        target.mkdir(parents=True)
    barrier()
    dist_checkpointing.save(_state(ddp, optimizer, schedule, mesh, step, is_loading=False), str(target))
    barrier()
    if is_main:
        atomic_write_text(root / LATEST, json.dumps({"step": step}) + "\n")
        for old in sorted(root.glob("step_*"))[:-keep]:
            shutil.rmtree(old)


def load_training(root: Path, ddp: Any, optimizer: Any, schedule: Any, mesh: Mesh) -> int:
    """Load the newest checkpoint into model, optimizer and schedule; returns its finished steps. Collective."""
    step = latest_step(root)
    if step is None or not (_folder(root, step) / "metadata.json").is_file():
        raise CheckpointError(f"{root} names no complete checkpoint; delete the folder to start again.")
    state = _state(ddp, optimizer, schedule, mesh, step, is_loading=True)
    state = dist_checkpointing.load(state, str(_folder(root, step)))
    ddp.module.load_state_dict(state["model"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"])
    return int(state["step"])
