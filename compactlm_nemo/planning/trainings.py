"""Two steps of a training by the package's own loop in a fake world, the second of which is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import StoredKind, TeacherSource
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.teacher import LiveTeacher, NoTeacher, Teacher
from compactlm_nemo.losses.targets import Targets, TeacherHead, TopK
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.planning.fake_world import FakeWorld
from compactlm_nemo.planning.simulate import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    STUDENT,
    TARGETS,
    TEACHER,
    Cost,
    build,
    dtype_of,
)
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.callbacks import Callback, ModelPass, Step
from compactlm_nemo.training.checkpoint import Checkpoints
from compactlm_nemo.training.optimizer import TrainableModel


class _NoCheckpoints(Checkpoints):
    """Keeps nothing."""

    def __init__(self) -> None:
        super().__init__(folder=Path("none"), keep=1, is_main=False)

    def latest_step(self) -> None:
        return None

    def save(self, *_: Any, **__: Any) -> None: ...


class _Watch(Callback):
    """Names what a training holds, and takes the peak of each phase of the second step, when all of it is there."""

    def __init__(self, there: FakeWorld, cost: Cost) -> None:
        self.meter, self.cost = there.meter, cost
        self.model: TrainableModel | None = None
        self._is_measured = False

    def _end_phase(self, phase: str) -> None:
        if self._is_measured:
            self.cost.peaks[phase] = self.meter.peak
        self.meter.start_peak()

    def before_step(self, step: int) -> None:
        self.meter.keep(OPTIMIZER)
        if step == 0:
            self.cost.peaks["start"] = self.meter.peak
        self._is_measured = step == 1
        self.meter.start_work()
        self.meter.start_peak()

    def before_student(self, student: ModelPass) -> None:
        self.meter.keep(TARGETS)
        self._end_phase("teacher")

    def after_student(self, student: ModelPass, terms: dict[str, float]) -> None:
        self._end_phase("gradients")

    def _watch_finish(self, config: Any) -> None:
        """Begin a phase where a pipeline schedule has run all micro-batches and sums gradients over ranks."""
        finish = config.finalize_model_grads_func

        def begin(*args: Any, **kwargs: Any) -> None:
            self._end_phase("student")
            finish(*args, **kwargs)

        config.finalize_model_grads_func = begin

    def after_update(self, step: Step) -> None:
        self.model = step.model
        if step.number == 0:
            for config in {id(ddp.module.config): ddp.module.config for ddp in step.model.ddps}.values():
                self._watch_finish(config)
        held = _held(step.model)
        for kind, tensors in held.items():
            self.meter.name(tensors, kind)
        self.cost.kept_bytes = sum(_bytes(held[kind]) for kind in (STUDENT, OPTIMIZER))

    def after_step(self, step: Step) -> None:
        self._end_phase("update")
        if self._is_measured:
            self.cost.work = self.meter.work


def _bytes(tensors: list[Tensor]) -> int:
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def _held(model: TrainableModel) -> dict[str, list[Tensor]]:
    """Return what a training holds all the time, by kind."""
    buffers = [buffer for ddp in model.ddps for buffer in ddp.buffers + ddp.expert_parallel_buffers]
    optimizer = []
    for part in model.optimizer.chained_optimizers:
        optimizer += [x for state in part.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        optimizer += [x for group in part.optimizer.param_groups for x in group["params"]]
    weights = [parameter for ddp in model.ddps for parameter in ddp.parameters()]
    parameters = {x.untyped_storage()._cdata for x in weights}
    return {
        STUDENT: weights,
        GRADIENTS: [buffer.grad_data for buffer in buffers],
        OPTIMIZER: [x for x in optimizer if x.untyped_storage()._cdata not in parameters],
    }


class _StoredTeacher(Teacher):
    """Gives targets as a stored teacher does, whose files are not there."""

    def __init__(self, config: Config, dims: Dims, there: FakeWorld, head_weight: Tensor | None) -> None:
        self.cache, self.dims, self.mesh, self.head_weight = config.cache, dims, there.mesh, head_weight

    def targets(self, batches: list[Batch]) -> list[Targets]:
        return [self._of(batch) for batch in batches] if self.mesh.is_last_stage else []

    def _of(self, batch: Batch) -> Targets:
        size, length = batch.tokens_BT.shape
        tokens = size * (length - 1) // self.mesh.cp_size
        if self.head_weight is not None:
            hidden_NG = torch.empty(tokens, self.dims.hidden_size, dtype=self.head_weight.dtype)
            return TeacherHead(hidden_NG, self.head_weight)
        ids_NK = torch.zeros(tokens, self.cache.k, dtype=torch.int64)
        return TopK(ids_NK, torch.zeros(tokens, self.cache.k), torch.zeros(tokens), torch.zeros(tokens))


def _teacher(there: FakeWorld, config: Config, cfg: DistillConfig, dims: Dims) -> Teacher:
    if cfg.teacher is TeacherSource.none:
        return NoTeacher(there.mesh)
    if cfg.teacher is TeacherSource.live:
        return LiveTeacher(build(there, config, dims, TEACHER))
    head = None
    if config.cache.kind is StoredKind.hidden and there.mesh.is_last_stage:
        head = torch.empty(dims.padded_vocab(there.mesh.tp_size, config.model.vocab_multiple), dims.hidden_size)
        head = head[: head.shape[0] // there.mesh.tp_size].to(dtype_of(config), copy=True)
        there.meter.name([head], TEACHER)
    return _StoredTeacher(config, dims, there, head)


def train(there: FakeWorld, config: Config, cfg: DistillConfig, teacher: Dims, student: Dims, count: int) -> Cost:
    """Take two steps of a training, and return the cost of the second."""
    cost, meter = Cost(), there.meter
    source = _teacher(there, config, cfg, teacher)
    chunks = build(there, config, student, STUDENT)
    batch = count * there.mesh.dp_size * cfg.micro_batch
    cfg = replace(
        cfg, steps=2, warmup_steps=0, global_batch=batch, eval_every=None, stop_after=None, start_from=None,
        result=type(cfg.result).last,
    )  # fmt: skip
    with _keeping_layers(chunks, meter):
        tokens = _real_tokens(config.data.sequence_length + 1)
        distill(chunks, source, lambda number: tokens, cfg, [_Watch(there, cost)], checkpoints=_NoCheckpoints())
    return cost


def _real_tokens(*shape: int) -> Tensor:
    """Return tokens that are there: threads read them, which see nothing of the fake world."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return torch.zeros(shape, dtype=torch.long)


@contextlib.contextmanager
def _keeping_layers(chunks: ModelChunks, meter: Any) -> Iterator[None]:
    """Call what is alive of a layer's forward pass in training activations."""

    def keep(module: Any, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            meter.keep(ACTIVATIONS)

    handles = [layer.register_forward_hook(keep) for layer in chunks.layers()]
    handles += [chunk.register_forward_hook(keep) for chunk in chunks.plain()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def distilling(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Take a step of the distill stage."""
    return train(there, config, config.distill, teacher, student, count)


def correcting(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Take a step of the correct_teacher stage, which trains the teacher itself."""
    return train(there, config, config.correction, teacher, teacher, count)
