"""Training checkpoints: weights, optimizer, schedule, position and RNG, loadable in any layout.

A checkpoint counts only when `latest.json` names it; that file is replaced atomically after everything is on disk,
so a kill at any instant leaves the previous checkpoint in force.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing

from compactlm_nemo.artifacts import atomic_write_text
from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.checkpoint import load_shards, load_state, model_state, sharding_metadata
from compactlm_nemo.parallel.collectives import barrier
from compactlm_nemo.parallel.mesh import Mesh

LATEST = "latest.json"


@dataclass
class TrainState:
    """How far a training is, apart from what torch and Megatron hold."""

    step: int = 0
    """Finished steps."""
    skipped_batches: int = 0
    """Global batches that were passed over when a loss spike sent the run back: step k trains batch k + given_up."""
    rewinds: int = 0
    """Times that this happened."""
    skipped: int = 0
    """Steps that did not reach the weights because they were not finite."""
    losses: list[float] = field(default_factory=list)
    """Those of the last steps, by which a spike is told."""
    best_step: int | None = None
    """Finished steps at the lowest held-out loss so far; its checkpoint is kept."""
    best_loss: float | None = None
    """That loss."""


def latest_step(folder: Path) -> int | None:
    """Steps finished at the newest complete checkpoint, None without one."""
    if not (folder / LATEST).is_file():
        return None
    return int(json.loads((folder / LATEST).read_text())["step"])


def _folder(root: Path, step: int) -> Path:
    return root / f"step_{step:07d}"


def _allocate_adam(optimizer: Any) -> None:
    """Give torch's Adam the state it otherwise makes at its first step: Megatron reads `step` before that."""
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
            for parameter in (p for group in adam.param_groups for p in group["params"] if p not in adam.state):
                zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0)} | zeros


@contextmanager
def _padding_counted(ddps: list[Any]) -> Iterator[None]:
    """Bucket sizes as they are in memory, for as long as Megatron gathers the optimizer's state.

    It leaves out the padding between buckets and then looks parameters up as if it were there. Where there are several
    buckets, as with overlap and on a pipeline's stages of a tied embedding, it would save moments of other parameters.
    Source: Megatron-LM pull request 5077, which mends it after version 0.16.
    """
    buffers = [buffer for ddp in ddps for buffer in ddp.buffers + ddp.expert_parallel_buffers]
    sizes = [(part, part.numel_unpadded) for buffer in buffers for part in (buffer, *buffer.buckets)]
    for buffer in buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for part, size in sizes:
            part.numel_unpadded = size


def _load_optimizer(optimizer: Any, state: dict[Any, Any]) -> None:
    """Load Megatron's optimizer, which is one for most parameters and one for those of spread experts, if any."""
    parts = optimizer.chained_optimizers
    for part, own in zip(parts, [state] if len(parts) == 1 else [state[i] for i in range(len(parts))], strict=True):
        _load_part(part, own)


def _load_part(part: Any, state: dict[str, Any]) -> None:
    """With torch's Adam in two steps, because Megatron mishandles its `step`.

    It looks for `step` among the moments, where no checkpoint has it, and loads one tensor for all parameters, which
    Adam would advance once for each of them.
    """
    adam = part.optimizer
    if not isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
        part.load_state_dict(state)
        return
    moments = state.pop("param_state")
    part.load_state_dict(state)
    steps = {parameter: values.pop("step").clone() for parameter, values in adam.state.items()}
    part.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        adam.state[parameter]["step"] = step


class Stateful(Protocol):
    """What else a training carries on, equal on every rank."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


def _state(
    ddps: list[Any], optimizer: Any, schedule: Any, mesh: Mesh, position: TrainState, is_loading: bool
) -> dict[str, Any]:
    weights = model_state([ddp.module for ddp in ddps], mesh)
    # Megatron looks up the shards by parameter and takes the first chunk's entry as `model`.
    by_chunk = weights if len(ddps) > 1 else weights["model0"]
    metadata = sharding_metadata(mesh)
    with _padding_counted(ddps):
        moments = optimizer.sharded_state_dict(by_chunk, is_loading=is_loading, metadata=metadata)
    return weights | {
        "optimizer": moments,
        "schedule": schedule.state_dict(),
        "position": asdict(position),
        "rng": torch.get_rng_state(),
    }


def save_training(
    root: Path,
    ddps: list[Any],
    optimizer: Any,
    schedule: Any,
    mesh: Mesh,
    *,
    position: TrainState,
    keep: int,
    is_main: bool,
    hidden_loss: Stateful | None = None,
) -> None:
    """Save at this position and drop all but the newest `keep` and the best. Collective."""
    target = _folder(root, position.step)
    if is_main:
        shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed while saving
        target.mkdir(parents=True)
    barrier()
    _allocate_adam(optimizer)
    state = _state(ddps, optimizer, schedule, mesh, position, is_loading=False)
    if hidden_loss is not None:
        state["hidden_loss"] = hidden_loss.state()
    dist_checkpointing.save(state, str(target))
    barrier()
    if is_main:
        atomic_write_text(root / LATEST, json.dumps({"step": position.step}) + "\n")
        for stale in root.glob("step_*"):  # of a run that got further and was killed before that counted
            if stale > target:
                shutil.rmtree(stale)
        best = None if position.best_step is None else _folder(root, position.best_step)
        for old in sorted(root.glob("step_*"))[:-keep]:
            if old != best:
                shutil.rmtree(old)


def load_training(
    root: Path,
    ddps: list[Any],
    optimizer: Any,
    schedule: Any,
    mesh: Mesh,
    hidden_loss: Stateful | None = None,
    step: int | None = None,
) -> TrainState:
    """Load the newest checkpoint, or the one of `step`, into what is given; returns where it stands. Collective."""
    step = latest_step(root) if step is None else step
    if step is None or not (_folder(root, step) / "metadata.json").is_file():
        raise CheckpointError(f"{root} names no complete checkpoint; delete the folder to start again.")
    _allocate_adam(optimizer)
    state = _state(ddps, optimizer, schedule, mesh, TrainState(), is_loading=True)
    state = load_shards(state, _folder(root, step))
    load_state([ddp.module for ddp in ddps], state)
    _load_optimizer(optimizer, state["optimizer"])
    schedule.num_steps = 0  # Megatron adds the loaded steps to those it has
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"])
    if hidden_loss is not None:
        hidden_loss.load_state(state["hidden_loss"])
    return TrainState(**state["position"])


def load_weights(root: Path, ddps: list[Any], mesh: Mesh, step: int) -> None:
    """Load the model, and nothing else, of the checkpoint after `step` finished steps. Collective."""
    chunks = [ddp.module for ddp in ddps]
    load_state(chunks, load_shards(model_state(chunks, mesh), _folder(root, step)))
