"""Files of a checkpoint that are written beside the steps hold what was to be saved, and count when all are there."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from compactlm_nemo.artifacts import HASHES
from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.config.failures import TRY_AGAIN, explain
from compactlm_nemo.config.loss import CROSS_ENTROPY
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.teacher import NoTeacher
from compactlm_nemo.models.build import global_names
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training import background_save
from compactlm_nemo.training.callbacks import Callback, MetricsLog, Step
from compactlm_nemo.training.checkpoint import Checkpoints, TrainState
from compactlm_nemo.training.optimizer import TrainableModel
from tests.chaos.world import descendants
from tests.support.meshes import LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

CFG = DistillConfig(
    steps=8, global_batch=4, micro_batch=1, lr=1e-2, min_lr=1e-3, checkpoint_every=3, loss=CROSS_ENTROPY
)  # fmt: skip
_write = background_save._write


def sample(idx: int) -> Tensor:
    return torch.randint(0, VOCAB, (13,), generator=torch.Generator().manual_seed(idx))


class Gate(Callback):
    """Lets files be written after a number of finished steps, and notes which checkpoint counts before each step."""

    def __init__(self, checkpoints: Checkpoints, opens_after: int) -> None:
        self.checkpoints, self.opens_after, self.is_open = checkpoints, opens_after, threading.Event()
        self.newest: list[int | None] = []
        background_save._write = self.write  # type: ignore[assignment]

    def write(self, *args: Any) -> background_save.Described:
        assert self.is_open.wait(60)
        return _write(*args)

    def before_step(self, step: int) -> None:
        self.newest.append(self.checkpoints.latest_step())
        time.sleep(0.05)  # a file that may be written is

    def after_step(self, step: Step) -> None:
        if step.num_done >= self.opens_after:
            self.is_open.set()


def train(root: Path, mesh: Mesh, checkpoints: Checkpoints, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train a fresh model; return its weights and metrics."""
    _, model = filled(root / "model", mesh)
    metrics: dict[int, dict[str, float]] = {}
    log = MetricsLog(lambda step, values: metrics.update({step: values}), every=1)
    distill(model, NoTeacher(mesh), sample, CFG, [*callbacks, log], checkpoints=checkpoints)
    return {"metrics": metrics} | {name: value.detach().clone() for name, value in global_names(model)}


def tensors_of(folder: Path) -> dict[str, Any]:
    """Hashes of the files with tensors, by checkpoint and name."""
    hashes = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"step_*/{HASHES}"))}
    return {step: {k: v for k, v in files.items() if k.endswith(".distcp")} for step, files in hashes.items()}


def _equals_waiting(rank: int, world: int, root: Path, layout: str) -> None:
    mesh = mesh_of(**LAYOUTS[layout][1]) if world == 2 else mesh_of()
    below, threads = descendants(os.getpid()), threading.active_count()
    waiting = Checkpoints(root / f"waits_{layout}_{world}", keep=3, is_main=rank == 0)
    want = train(root, mesh, waiting, [Gate(waiting, opens_after=1)])
    beside = Checkpoints(root / f"beside_{layout}_{world}", keep=3, is_main=rank == 0, in_background=True)
    gate = Gate(beside, opens_after=4 if world == 1 else 3 + 2 * rank)  # of the save after 3 steps
    got = train(root, mesh, beside, [gate])
    assert gate.newest[: 3 + world] == [None] * (3 + world), gate.newest
    assert gate.newest[6:] in ([3, 3], [3, 6])
    assert got.pop("metrics") == want.pop("metrics")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    dist.barrier()
    found = tensors_of(beside.folder)
    assert found == tensors_of(waiting.folder)
    assert sorted(found) == ["step_0000003", "step_0000006", "step_0000008"]  # the first was held back
    assert sum(map(len, found.values())) >= 3 * world
    assert beside.latest_step() == 8 and beside.seconds > 0
    assert descendants(os.getpid()) == below and threading.active_count() == threads


@pytest.mark.parametrize(("world", "layout"), [(1, "dp2"), (2, "dp2"), (2, "tp2")])
def test_a_checkpoint_that_is_written_beside_the_steps_is_the_one_that_was_waited_for(
    root: Path, tmp_path: Path, world: int, layout: str
) -> None:
    run_ranks(_equals_waiting, world, tmp_path, root, layout)


class _Rewind(Callback):
    """Goes back once, at step 4, while the checkpoint of step 3 is written."""

    has_gone_back = False

    def must_rewind(self, step: Step) -> bool:
        goes_back = step.number == 4 and not self.has_gone_back
        self.has_gone_back |= goes_back
        return goes_back


def _rewinds(rank: int, world: int, root: Path) -> None:
    found, mesh = [], mesh_of()
    for in_background in (False, True):
        checkpoints = Checkpoints(root / f"rewind_{in_background}", 2, rank == 0, in_background=in_background)
        background_save._write = _slow_write
        found.append(train(root, mesh, checkpoints, [_Rewind()]))
    assert found[0].pop("metrics") == found[1].pop("metrics")
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _slow_write(*args: Any) -> background_save.Described:
    time.sleep(0.5)
    return _write(*args)


def test_a_rewind_goes_back_to_the_checkpoint_that_is_being_written(root: Path, tmp_path: Path) -> None:
    run_ranks(_rewinds, 1, tmp_path, root)


def _fails(rank: int, world: int, root: Path, name: str) -> None:
    """Rank 1 alone fails: Megatron's own writing of a tensor, or the hash of a file."""
    owner = filesystem_async if name == "_write_item" else background_save
    right, model = getattr(owner, name), TrainableModel(filled(root / "model", mesh_of())[1], CFG)
    checkpoints = Checkpoints(root / name, keep=2, is_main=rank == 0, in_background=True)
    checkpoints.save(model, TrainState(step=1))
    checkpoints.finish()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    if rank == 1:
        setattr(owner, name, fail)
    checkpoints.save(model, TrainState(step=2))
    end = time.monotonic() + 60
    with pytest.raises(BaseException) as caught:  # noqa: PT011  torch's is no Exception; what it means is asked for
        while time.monotonic() < end:
            checkpoints.finish_if_written()
    failure = explain(caught.value)
    if rank == 0 or name == "describe_files":  # Megatron gives the cause to the main rank, which speaks
        assert failure.code == TRY_AGAIN and failure.line.startswith("error: no space left for ")
    assert checkpoints.latest_step() == 1
    setattr(owner, name, right)
    checkpoints.save(model, TrainState(step=2))  # there is room again
    checkpoints.finish()
    dist.barrier()
    assert checkpoints.latest_step() == 2


@pytest.mark.parametrize("what", ["_write_item", "describe_files"])
def test_what_one_rank_cannot_write_ends_all(root: Path, tmp_path: Path, what: str) -> None:
    run_ranks(_fails, 2, tmp_path, root, what)


class _Raise(Callback):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def after_step(self, step: Step) -> None:
        if step.num_done == 5:
            raise self.error


def _an_error(rank: int, world: int, root: Path) -> None:
    background_save._write = _slow_write
    threads, mesh = threading.active_count(), mesh_of()
    checkpoints = Checkpoints(root / "error", keep=2, is_main=True, in_background=True)
    with pytest.raises(KeyError):
        train(root, mesh, checkpoints, [_Raise(KeyError("of this rank alone"))])
    assert checkpoints.latest_step() is None
    assert threading.active_count() == threads
    assert train(root, mesh, replace(checkpoints))["metrics"].keys() == set(range(8))  # from the start
    assert sorted(path.name for path in checkpoints.folder.glob("step_*")) == ["step_0000006", "step_0000008"]


def test_an_error_leaves_no_thread_and_no_checkpoint_that_ranks_have_not_agreed_on(root: Path, tmp_path: Path) -> None:
    run_ranks(_an_error, 1, tmp_path, root)


class _Keeps(Callback):
    def __init__(self, *steps: int) -> None:
        self.steps = set(steps)

    def kept_checkpoints(self) -> set[int]:
        return self.steps


def _keeps(rank: int, world: int, root: Path) -> None:
    model = TrainableModel(filled(root / "model", mesh_of())[1], CFG)
    checkpoints = Checkpoints(root / "kept", keep=1, is_main=True, in_background=True)
    keeps, folder = _Keeps(1), checkpoints.folder
    for step in (1, 2):
        checkpoints.save(model, TrainState(step=step), [keeps])
    keeps.steps = {3}  # as a better step that is saved next
    (folder / "step_0000000").mkdir()  # of a kill while that was written
    checkpoints.finish()
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_0000001", "step_0000002"]


def test_what_a_checkpoint_still_needs_stays_while_the_next_is_written(root: Path, tmp_path: Path) -> None:
    """A kill now goes on from step 2, whose best step is 1."""
    run_ranks(_keeps, 1, tmp_path, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("async")
    save_tiny("llama", root / "model", num_hidden_layers=2)
    return root
