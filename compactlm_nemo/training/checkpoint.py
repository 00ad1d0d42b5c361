"""Training checkpoints: weights, optimizer, schedule, progress, callbacks and RNG, loadable in any layout.

A checkpoint counts only when `latest.json` names it; that file is replaced atomically after everything is on disk,
so a kill at any instant leaves the previous checkpoint in force.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from compactlm_nemo.artifacts import atomic_write_text
from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.checkpoint import load_shards, load_state, model_state, sharding_metadata
from compactlm_nemo.parallel.collectives import barrier
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.callbacks import Callback
from compactlm_nemo.training.optimizer import TrainableModel

LATEST = "latest.json"


@dataclass
class TrainState:
    """Progress of a training, apart from what the model and the callbacks hold."""

    step: int = 0
    """Finished steps."""
    skipped_batches: int = 0
    """Global batches passed over by rewinds: step k trains batch k + skipped_batches."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training in a folder; all ranks call every method."""

    folder: Path
    mesh: Mesh
    keep: int
    """Newest checkpoints that are kept, besides those that callbacks keep."""
    is_main: bool
    """Whether this rank makes and deletes folders."""

    def latest_step(self) -> int | None:
        """Return the finished steps at the newest complete checkpoint, None without one."""
        if not (self.folder / LATEST).is_file():
            return None
        return int(json.loads((self.folder / LATEST).read_text())["step"])

    def save(self, model: TrainableModel, state: TrainState, callbacks: Sequence[Callback] = ()) -> None:
        """Save the training at this state, and delete older checkpoints that need not be kept."""
        model.finish_gathering()
        for callback in callbacks:
            callback.save(state.step)
        target = self._step_folder(state.step)
        if self.is_main:
            shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed while saving
            target.mkdir(parents=True)
        barrier()
        _allocate_adam(model.optimizer)
        dist_checkpointing.save(
            _model_state(model, self.mesh, is_loading=False)
            | {
                "rng": torch.get_rng_state(),
                "train_state": asdict(state),
                "callbacks": {type(callback).__name__: callback.state() for callback in callbacks},
            },
            str(target),
        )
        barrier()
        if self.is_main:
            atomic_write_text(self.folder / LATEST, json.dumps({"step": state.step}) + "\n")
            self._delete_others(target, {step for callback in callbacks for step in callback.kept_checkpoints()})

    def load(self, model: TrainableModel, callbacks: Sequence[Callback] = (), *, step: int | None = None) -> TrainState:
        """Load the newest checkpoint, or that of `step` finished steps, into the model and the callbacks.

        A callback of which the checkpoint holds no state stays as it is.
        """
        step = self.latest_step() if step is None else step
        if step is None or not (self._step_folder(step) / "metadata.json").is_file():
            raise CheckpointError(f"{self.folder} names no complete checkpoint; delete the folder to start again.")
        _allocate_adam(model.optimizer)
        loaded = load_shards(_model_state(model, self.mesh, is_loading=True), self._step_folder(step))
        load_state([ddp.module for ddp in model.ddps], loaded)
        _load_optimizer(model.optimizer, loaded["optimizer"])
        model.schedule.num_steps = 0  # Megatron adds the loaded steps to those it has
        model.schedule.load_state_dict(loaded["schedule"])
        torch.set_rng_state(loaded["rng"])
        for callback in callbacks:
            if (name := type(callback).__name__) in loaded["callbacks"]:
                callback.load_state(loaded["callbacks"][name])
            callback.load(step)
        return TrainState(**loaded["train_state"])

    def load_weights(self, model: TrainableModel, step: int) -> None:
        """Load the weights, and nothing else, of the checkpoint of `step` finished steps."""
        chunks = [ddp.module for ddp in model.ddps]
        load_state(chunks, load_shards(model_state(chunks, self.mesh), self._step_folder(step)))

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}"

    def _delete_others(self, newest: Path, kept_steps: set[int]) -> None:
        for later in self.folder.glob("step_*"):  # of a run that got further and was killed before that counted
            if later > newest:
                shutil.rmtree(later)
        for old in sorted(self.folder.glob("step_*"))[: -self.keep]:
            if old not in {self._step_folder(step) for step in kept_steps}:
                shutil.rmtree(old)


def _model_state(model: TrainableModel, mesh: Mesh, is_loading: bool) -> dict[str, Any]:
    """Return Megatron's sharded state of weights, optimizer and schedule."""
    weights = model_state([ddp.module for ddp in model.ddps], mesh)
    # Megatron looks up the shards by parameter and takes the first chunk's entry as `model`.
    by_chunk = weights if len(model.ddps) > 1 else weights["model0"]
    metadata = sharding_metadata(mesh)
    with _padding_counted(model.ddps):
        moments = model.optimizer.sharded_state_dict(by_chunk, is_loading=is_loading, metadata=metadata)
    return weights | {"optimizer": moments, "schedule": model.schedule.state_dict()}


def _allocate_adam(optimizer: Any) -> None:
    """Give torch's Adam the state that Adam makes at its first step: Megatron reads `step` before that."""
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
            for parameter in (p for group in adam.param_groups for p in group["params"] if p not in adam.state):
                zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0)} | zeros


@contextmanager
def _padding_counted(ddps: list[Any]) -> Iterator[None]:
    """Show bucket sizes with their padding, for as long as Megatron gathers the optimizer's state.

    Megatron leaves out the padding between buckets and then looks parameters up as if the padding were there. With
    several buckets, as with overlap and on a pipeline's stages of a tied embedding, it would save moments of other
    parameters.
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
    states = [state] if len(parts) == 1 else [state[i] for i in range(len(parts))]
    for part, part_state in zip(parts, states, strict=True):
        _load_part(part, part_state)


def _load_part(part: Any, state: dict[str, Any]) -> None:
    """Load one optimizer; torch's Adam in two steps, because Megatron mishandles Adam's `step`.

    Megatron looks for `step` among the moments, where no checkpoint has it, and loads one tensor for all parameters,
    which Adam would advance once for each parameter.
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
