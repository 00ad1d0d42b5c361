"""Training checkpoints: weights, optimizer, schedule, progress, callbacks and random states, loadable in any layout.

A checkpoint counts only when `latest.json` names it; that file is replaced atomically after everything is on disk,
so a kill at any instant leaves the previous checkpoint in force, also while threads write the files of the next one.
Each holds the hashes of its files: one that is damaged gives way to the one before it.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from compactlm_nemo.artifacts import HASHES, atomic_write_text
from compactlm_nemo.errors import CheckpointError, NumericsError
from compactlm_nemo.models.checkpoint import first_nonfinite, load_shards, load_state, model_state
from compactlm_nemo.parallel.collectives import barrier, broadcast_object
from compactlm_nemo.parallel.interruption import note_save, on_any_rank, saving
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.parallel.shared_files import shared_file_problems
from compactlm_nemo.training.background_save import BackgroundSave
from compactlm_nemo.training.callbacks import Callback, Saving
from compactlm_nemo.training.optimizer import TrainableModel
from compactlm_nemo.training.optimizer_state import allocate, num_updates, set_num_updates, sharded_state

LATEST = "latest.json"

LAYOUT = "layout.json"
"""In each checkpoint: how its ranks were placed."""


_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Progress of a training, apart from what the model and the callbacks hold."""

    step: int = 0
    """Finished steps."""
    skipped_batches: int = 0
    """Global batches passed over by rewinds: step k trains batch k + skipped_batches."""


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that does not count yet."""

    step: int
    files: BackgroundSave
    others: list[Saving]
    """What callbacks save with it."""
    kept_steps: set[int]
    """Finished steps of the checkpoints that the callbacks, as they are in this one, still need."""


@dataclass
class Checkpoints:
    """The checkpoints of one training in a folder; all ranks call every method."""

    folder: Path
    keep: int
    """Newest checkpoints that are kept, besides those that callbacks keep."""
    is_main: bool
    """Whether this rank makes and deletes folders."""
    in_background: bool = False
    """Whether training goes on while threads write the files of a checkpoint, which then counts some steps later."""
    seconds: float = field(default=0.0, init=False)
    """Time for which saving has held up this process."""
    _pending: _Pending | None = field(default=None, init=False, repr=False)

    def latest_step(self) -> int | None:
        """Return finished steps at the newest complete checkpoint, which `latest.json` names; None without one."""
        try:
            return int(json.loads((self.folder / LATEST).read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def drop_damaged(self, *others: Checkpoints) -> None:
        """Let the newest checkpoint that is whole, here and at the same step of `others`, be in force, and say so.

        Without one training begins anew. Every file of the checkpoints that are looked at is read once. Collective.
        """
        named = broadcast_object(self.latest_step() if self.is_main else None)
        steps = broadcast_object(sorted(self._steps(), reverse=True) if self.is_main else [])
        if named is not None:  # newer ones were being written when a run was killed
            steps = [step for step in steps if step <= named]
        for step in steps:
            problems = [problem for one in (self, *others) for problem in one._problems(step)]
            if not problems:
                break
            self._warn(f"{problems[0]}; that checkpoint is left out.")
        else:
            step = None
            if steps or (self.is_main and (self.folder / LATEST).exists()):
                self._warn(f"{self.folder} holds no whole checkpoint; training begins anew.")
        if step != named and self.is_main:
            if step is None:
                (self.folder / LATEST).unlink(missing_ok=True)
            else:
                atomic_write_text(self.folder / LATEST, json.dumps({"step": step}) + "\n")
        barrier()

    def _steps(self) -> list[int]:
        """Return finished steps of the checkpoints that were written to their end."""
        return [int(path.parent.name.removeprefix("step_")) for path in self.folder.glob(f"step_*/{HASHES}")]

    def _problems(self, step: int) -> list[str]:
        """Return, on every rank, what is wrong with the files of a checkpoint."""
        folder, recorded = self._step_folder(step), None
        if self.is_main:
            try:
                recorded = dict(json.loads((folder / HASHES).read_text()))
            except (OSError, ValueError, TypeError):
                recorded = None
        recorded = broadcast_object(recorded)
        if not recorded or not all(isinstance(x, dict) and {"bytes", "sha256"} <= x.keys() for x in recorded.values()):
            return [f"{folder / HASHES} is damaged or missing"]
        return shared_file_problems(folder, recorded)

    def _warn(self, message: str) -> None:
        if self.is_main:
            _log.warning("%s", message)

    def save(self, model: TrainableModel, state: TrainState, callbacks: Sequence[Callback] = ()) -> None:
        """Save the training at this state, and delete older checkpoints that need not be kept.

        In the background only the copy is made before this returns; what it was before the copy is finished first.

        Raises:
            NumericsError: a weight or moment is not finite; the checkpoints stay as they were.
        """
        self.finish()
        with self._measured():
            self._pending = self._begin(model, state, callbacks)
        if not self.in_background:
            self.finish()

    def is_written(self) -> bool:
        """Return whether the threads of this rank have written the files of every checkpoint."""
        pending = self._pending
        return pending is None or (pending.files.is_written() and all(other.is_written() for other in pending.others))

    def finish_if_written(self) -> None:
        """Let the checkpoint that is being saved count, once every rank has written its files."""
        if self._pending is None:
            return
        note_save(time.monotonic() - self._pending.files.begun)
        with self._measured():
            is_written = not on_any_rank(not self.is_written())
        if is_written:
            self.finish()

    def finish(self) -> None:
        """Wait for the files of the checkpoint that is being saved, if there is one, and let it count."""
        if (pending := self._pending) is None:
            return
        self._pending = None
        with self._measured():
            for other in pending.others:
                other.finish()
            hashes = pending.files.finish()
            target = self._step_folder(pending.step)
            if self.is_main:
                atomic_write_text(target / HASHES, json.dumps(hashes, indent=2) + "\n")
                atomic_write_text(self.folder / LATEST, json.dumps({"step": pending.step}) + "\n")
                self._delete_others(target, pending.kept_steps)
        note_save(time.monotonic() - pending.files.begun)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Finish what is being saved when the body ends; an error that other ranks may not have leaves it out."""
        try:
            yield
        except NumericsError:  # of metrics that are equal on every rank
            self.finish()
            raise
        except BaseException:
            if self._pending is not None:
                self._pending.files.close()
            raise
        self.finish()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        start = time.monotonic()
        with saving():
            yield
        self.seconds += time.monotonic() - start

    def _begin(self, model: TrainableModel, state: TrainState, callbacks: Sequence[Callback]) -> _Pending:
        """Copy the state and let threads write it."""
        model.finish_gathering()
        saved = _model_state(model, _sharded_by_rank(_random_states()))
        if key := first_nonfinite(saved):
            raise NumericsError(self._diverged(key, state.step))
        others = [other for callback in callbacks if (other := callback.save(state.step)) is not None]
        target = self._step_folder(state.step)
        if self.is_main:
            shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed while saving
            target.mkdir(parents=True)
        barrier()
        common = {
            "train_state": asdict(state),
            "callbacks": {type(callback).__name__: callback.state() for callback in callbacks},
        }
        files = BackgroundSave(saved | common, target, may_change=self.in_background)
        if self.is_main:
            atomic_write_text(target / LAYOUT, json.dumps(_layout(model.ddps.mesh)) + "\n")
        kept_steps = {step for callback in callbacks for step in callback.kept_checkpoints()}
        return _Pending(state.step, files, others, kept_steps)

    def load(self, model: TrainableModel, callbacks: Sequence[Callback] = (), *, step: int | None = None) -> TrainState:
        """Load the newest checkpoint, or that of `step` finished steps, into the model and the callbacks.

        A callback of which the checkpoint holds no state stays as it is.
        """
        self.finish()
        step = self.latest_step() if step is None else step
        if step is None or not (self._step_folder(step) / "metadata.json").is_file():
            raise CheckpointError(f"{self.folder} names no complete checkpoint; delete the folder to start again.")
        is_same_layout = self._has_layout(step, model.ddps.mesh)
        states = _random_states() if is_same_layout else {}
        loaded = load_shards(_model_state(model, _sharded_by_rank(states)), self._step_folder(step))
        load_state(model.ddps, loaded)
        set_num_updates(model.optimizer, loaded["num_updates"])
        model.schedule.num_steps = 0  # Megatron adds the loaded steps to those it has
        model.schedule.load_state_dict(loaded["schedule"])
        if is_same_layout:
            _set_random_states({name: state[0] for name, state in loaded["random"].items()})
        for callback in callbacks:
            if (name := type(callback).__name__) in loaded["callbacks"]:
                callback.load_state(loaded["callbacks"][name])
            callback.load(step)
        return TrainState(**loaded["train_state"])

    def load_weights(self, model: TrainableModel, step: int) -> None:
        """Load the weights, and nothing else, of the checkpoint of `step` finished steps."""
        if problems := self._problems(step):
            raise CheckpointError(f"{problems[0]}; delete {self.folder} to train again, or set distill.result=last.")
        load_state(model.ddps, load_shards(model_state(model.ddps), self._step_folder(step)))

    def _diverged(self, key: str, step: int) -> str:
        """Return the message about a training whose state is not finite."""
        newest = self.latest_step()
        kept = f"the checkpoint of step {newest} stays" if newest is not None else "nothing is saved"
        return (
            f"after step {step} {key} holds NaN or infinity: training has diverged, and {kept}; lower the learning "
            f"rate, look at the data, and delete {self.folder.parent} to train with other settings."
        )

    def _has_layout(self, step: int, mesh: Mesh) -> bool:
        """Whether a checkpoint's ranks are placed as these are; only then do its random states have ranks to go to."""
        path, saved = self._step_folder(step) / LAYOUT, None
        if self.is_main:
            with suppress(OSError, ValueError):  # a damaged one was found by its hash
                saved = json.loads(path.read_text())
        if broadcast_object(saved) == _layout(mesh):
            return True
        if self.is_main:
            _log.warning("%s: saved in another layout; random states begin with run.seed.", self._step_folder(step))
        return False

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}"

    def _delete_others(self, newest: Path, kept_steps: set[int]) -> None:
        for other in self.folder.glob("step_*"):  # of a run that was killed while saving, or before that counted
            if other > newest or not (other / HASHES).exists():
                shutil.rmtree(other)
        for old in sorted(self.folder.glob("step_*"))[: -self.keep]:
            if old not in {self._step_folder(step) for step in kept_steps}:
                shutil.rmtree(old)


def _model_state(model: TrainableModel, random_states: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state of weights, optimizer, schedule and random numbers; loading fills the first two."""
    allocate(model.optimizer)
    weights = model_state(model.ddps)
    return weights | {
        "optimizer": sharded_state(model.optimizer, weights),
        "num_updates": num_updates(model.optimizer),
        "schedule": model.schedule.state_dict(),
        "random": random_states,
    }


def _layout(mesh: Mesh) -> dict[str, Any]:
    """Return what decides which rank draws which random numbers."""
    return asdict(mesh.layout) | {"world": dist.get_world_size()}


def _random_states() -> dict[str, Tensor]:
    """Return the states of this rank's generators: CPU, CUDA, and those that Megatron makes from both parallel axes."""
    by_name = {f"parallel.{name}": state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()} | by_name


def _set_random_states(states: dict[str, Tensor]) -> None:
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: states[f"parallel.{name}"] for name in tracker.get_states()})
    torch.cuda.set_rng_state(states["cuda"])
    torch.set_rng_state(states["cpu"])


def _sharded_by_rank(states: dict[str, Tensor]) -> dict[str, ShardedTensor]:
    """Return tensors whose first axis is the global rank."""
    place = (0, dist.get_rank(), dist.get_world_size())
    return {
        name: ShardedTensor.from_rank_offsets(f"random.{name}", state[None], place) for name, state in states.items()
    }
