"""A callback is called at every moment of a training, and goes on with its state after a stop and a rewind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.teacher import LiveTeacher
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.callbacks import Callback, MetricsLog, PeakMemory, Speed, Step, StopAfter
from compactlm_nemo.training.checkpoint import Checkpoints, TrainState
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny
from tests.training.test_stability import sample

CONFIG = DistillConfig(steps=4, global_batch=2, micro_batch=1, checkpoint_every=2)


class Recorder(Callback):
    """Notes every call, and counts the steps in its state; `rewind_at` discards that step once."""

    def __init__(self, rewind_at: int | None = None, skip: int | None = None) -> None:
        self.calls: list[str] = []
        self.rewind_at, self.skip, self.steps = rewind_at, skip, 0

    def must_stop(self, num_done: int) -> bool:
        self.calls.append(f"must_stop {num_done}")
        return False

    def before_step(self, step: int) -> None:
        self.calls.append(f"before_step {step}")

    def before_teacher(self) -> None:
        self.calls.append("before_teacher")

    def before_student(self, student: Any) -> None:
        self.calls.append(f"before_student {len(student.batches)}")

    def before_micro_batch(self, idx: int) -> None:
        self.calls.append(f"before_micro_batch {idx}")

    def after_student(self, student: Any, terms: dict[str, float]) -> None:
        self.calls.append("after_student")
        terms["own"] = student.logit_loss(terms)

    def must_rewind(self, step: Step) -> bool:
        assert step.metrics["own"] == step.metrics["train/kd_forward_kl"]
        is_due, self.rewind_at = (
            step.number == self.rewind_at,
            None if step.number == self.rewind_at else self.rewind_at,
        )
        return is_due

    def should_skip(self, step: Step) -> bool:
        assert "train/grad_norm" in step.metrics
        return step.number == self.skip

    def after_update(self, step: Step) -> None:
        self.calls.append("after_update")

    def after_step(self, step: Step) -> None:
        self.calls.append("after_step, last" if step.is_last else "after_step")
        self.steps += 1
        step.must_save, step.must_log = step.number == 0, step.number == 2

    def after_training(self, model: Any) -> None:
        self.calls.append("after_training")

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def save(self, step: int) -> None:
        self.calls.append(f"save {step}")

    def load(self, step: int) -> None:
        self.calls.append(f"load {step}")

    def kept_checkpoints(self) -> set[int]:
        return {1}


def train(root: Path, mesh: Mesh, name: str, *callbacks: Callback) -> TrainState:
    _, student = filled(root / "student", mesh)
    dims, teacher = filled(root / "teacher", mesh)
    checkpoints = Checkpoints(root / name, keep=1, is_main=True)
    return distill(student, LiveTeacher(teacher), sample, CONFIG, callbacks, checkpoints=checkpoints)


SCHEDULE = ["before_teacher", "before_student 2", "before_micro_batch 0", "before_micro_batch 1", "after_student"]


def _every_moment(rank: int, world: int, root: Path) -> None:
    recorder = Recorder(skip=1)
    train(root, mesh_of(), "moments", recorder)
    assert recorder.calls == [
        "must_stop 0",
        "before_step 0", *SCHEDULE, "after_update", "must_stop 1", "after_step", "save 1",
        "before_step 1", *SCHEDULE, "must_stop 2", "after_step", "save 2",
        "before_step 2", *SCHEDULE, "after_update", "must_stop 3", "after_step",
        "before_step 3", *SCHEDULE, "after_update", "must_stop 4", "after_step, last", "save 4",
        "after_training",
    ]  # fmt: skip
    kept = sorted(path.name for path in (root / "moments").glob("step_*"))
    assert kept == ["step_0000001", "step_0000004"]


def _state(rank: int, world: int, root: Path) -> None:
    mesh, stopped = mesh_of(), Recorder()
    assert train(root, mesh, "state", stopped, StopAfter(3)).step == 3
    assert stopped.calls[-1] == "save 3"
    assert train(root, mesh, "state", Recorder(), StopAfter(3)).step == 3  # it stays stopped
    resumed, unknown = Recorder(rewind_at=3), _Unknown()
    end = train(root, mesh, "state", resumed, unknown)
    assert (end.step, end.skipped_batches) == (4, 1)
    assert [call for call in resumed.calls if call.startswith(("load", "save"))] == ["load 3", "load 3", "save 4"]
    assert resumed.steps == 4 and unknown.steps == 1


class _Unknown(Recorder):
    """A callback of which the checkpoint holds nothing."""


def _metrics(rank: int, world: int, root: Path) -> None:
    logged: dict[int, dict[str, float]] = {}
    speed = Speed(lambda seconds: {"perf/tokens_per_second": 24 / seconds})
    train(
        root, mesh_of(), "metrics", speed, PeakMemory(), Recorder(),
        MetricsLog(lambda step, metrics: logged.update({step: metrics}), every=2),
    )  # fmt: skip
    assert sorted(logged) == [1, 2, 3]  # every second one, and the one that had to be
    for metrics in logged.values():
        tokens = metrics["perf/tokens_per_second"] * metrics["perf/step_seconds"]
        assert tokens == pytest.approx(metrics["train/tokens"]) and metrics["train/tokens"] == 24
        assert metrics["perf/peak_memory_bytes"] > 2**20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("callbacks")
    save_tiny("llama", root / "teacher")
    save_tiny("llama", root / "student", num_hidden_layers=2, hidden_size=32, intermediate_size=48)
    return root


@pytest.mark.parametrize("scenario", [_every_moment, _state, _metrics])
def test_callbacks(scenario: Callable[..., None], root: Path, tmp_path: Path) -> None:
    run_ranks(scenario, 1, tmp_path, root)
