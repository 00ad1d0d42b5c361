"""Trainings on a fake world: the distill and correct_teacher stages, with every teacher and loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.config.loss import Projection
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import StoredKind, TeacherSource
from compactlm_nemo.distill.hidden_states import HiddenStateLoss
from compactlm_nemo.distill.layer_pairs import LayerPair, StatePlace
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.projections import Projections
from compactlm_nemo.distill.teacher import LiveTeacher, NoTeacher, OwnMeshTeacher, Teacher
from compactlm_nemo.distill.teacher_correction import TeacherCorrection
from compactlm_nemo.losses.targets import Targets, TeacherHead, TopK
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.launch import second_mesh
from compactlm_nemo.planning.fake_world import FakeWorld, fake_world
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
    micro_batch_counts,
)  # fmt: skip
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.callbacks import Callback, ModelPass, Step
from compactlm_nemo.training.checkpoint import Checkpoints
from compactlm_nemo.training.optimizer import TrainableModel

START = "start"
"""Phase before the first step, in which model and optimizer are made."""


class NoCheckpoints(Checkpoints):
    """Keeps nothing."""

    def __init__(self) -> None:
        super().__init__(folder=Path("none"), keep=1, is_main=False)

    def latest_step(self) -> None:
        return None

    def save(self, *_: Any, **__: Any) -> None: ...


class _Watch(Callback):
    """Names what a training holds, and takes the peak of each phase of the second step, when all of it is there."""

    def __init__(self, there: FakeWorld, cost: Cost, others: list[Callback]) -> None:
        self.meter, self.cost = there.meter, cost
        self.teachers = [each.model for each in others if isinstance(each, TeacherCorrection)]
        self.model: TrainableModel | None = None
        self._is_measured = False

    def _end_phase(self, phase: str) -> None:
        if self._is_measured:
            self.cost.peaks[phase] = self.meter.peak
        self.meter.start_peak()

    def before_step(self, step: int) -> None:
        self.meter.keep(OPTIMIZER)
        if step == 0:
            self.cost.peaks[START] = self.meter.peak
        self._is_measured = step == 1
        if self._is_measured and self.meter.curve is not None:
            self.meter.curve.clear()
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
        self.cost.kept_bytes = _kept(held)

    def after_step(self, step: Step) -> None:
        for model in self.teachers:
            held = _held(model)
            for kind, tensors in held.items():
                self.meter.name(tensors, f"{TEACHER}'s {kind}")
            self.cost.kept_bytes += _kept(held)
        self._end_phase("update")
        if self._is_measured:
            self.cost.work = self.meter.work
            self.cost.curve, self.meter.curve = self.meter.curve, None


def _bytes(tensors: list[Tensor]) -> int:
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def _kept(held: dict[str, list[Tensor]]) -> int:
    """Return the bytes that a checkpoint of this rank holds."""
    return sum(_bytes(held[kind]) for kind in (STUDENT, OPTIMIZER))


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


class _OwnMeshTeacher(OwnMeshTeacher):
    """Knows from the layouts what ranks tell each other: which has the teacher's states, and which want them."""

    def __init__(self, chunks: ModelChunks, there: FakeWorld, layouts: Config, head_weight: Tensor | None) -> None:
        self.chunks, self.mesh, self.head_weight = chunks.eval(), there.mesh, head_weight
        self.teacher_mesh = mesh = chunks.mesh
        self.is_source = mesh.is_last_stage and mesh.tp_rank == 0
        world = dist.get_world_size()
        teaches = _last_stage(layouts.teacher_parallel, world)
        self.source_rank = {dp_rank: ranks[0] for dp_rank, ranks in enumerate(teaches)}
        self.target_ranks = _last_stage(layouts.parallel, world)


def _last_stage(layout: ParallelConfig, world: int) -> list[list[int]]:
    """Return the tensor-parallel ranks of the last stage for every data-parallel rank, in Megatron's order of ranks."""
    dp = world // layout.model_ranks
    first = (layout.pp - 1) * layout.tp * dp
    return [[first + dp_rank * layout.tp + rank for rank in range(layout.tp)] for dp_rank in range(dp)]


def _teacher(there: FakeWorld, config: Config, cfg: DistillConfig, dims: Dims) -> Teacher:
    if cfg.teacher is TeacherSource.none:
        return NoTeacher(there.mesh)
    if cfg.teacher is TeacherSource.live and config.teacher_parallel == config.parallel:
        return LiveTeacher(build(there, config, dims, TEACHER))
    if cfg.teacher is TeacherSource.live:
        mesh = second_mesh(config.teacher_parallel, config.run.seed)
        with mesh.active():
            chunks = build(there, config, dims, TEACHER, mesh)
        return _OwnMeshTeacher(chunks, there, config, _head(there, config, dims))
    head = _head(there, config, dims) if config.cache.kind is StoredKind.hidden else None
    return _StoredTeacher(config, dims, there, head)


def _head(there: FakeWorld, config: Config, dims: Dims) -> Tensor | None:
    """Return a rank's rows of the teacher's output weights on the last stage."""
    if not there.mesh.is_last_stage:
        return None
    rows = dims.padded_vocab(there.mesh.tp_size, config.model.vocab_multiple) // there.mesh.tp_size
    head = torch.empty(rows, dims.hidden_size, dtype=dtype_of(config))
    there.meter.name([head], TEACHER)
    return head


def _hidden_losses(config: Config, teacher: Teacher, student: ModelChunks) -> list[Callback]:
    """Return the losses between hidden states that are on; for layers that a small model lacks its last stands in."""
    cfg = config.distill.hidden
    if not cfg.is_on or not isinstance(teacher, LiveTeacher):
        return []
    pairs = [LayerPair(StatePlace("embedding", 0), StatePlace("embedding", 0))] if cfg.embedding else []
    depths = [chunks.dims.num_layers for chunks in (teacher.chunks, student)]
    for kind, maps in cfg.maps().items():
        for layers in maps:
            places = [_near(layer, depth) for layer, depth in zip(layers, depths, strict=True)]
            pairs.append(LayerPair(*(StatePlace(kind, layer) for layer in places)))
    projections = None
    if cfg.projection is not Projection.none:
        start_GH = torch.empty(teacher.chunks.dims.hidden_size, student.dims.hidden_size)
        projections = Projections(len(pairs), cfg.projection is Projection.shared, start_GH, config.distill)
    loss = HiddenStateLoss(cfg, pairs, teacher.chunks, student, projections)
    teacher.on_input = loss.before_teacher_micro_batch
    return [loss]


def _near(layer: int, depth: int) -> int:
    """Return a layer of a model of this depth, counted from the start, for one of a deeper model."""
    return min(layer, depth - 1) if layer >= 0 else max(depth + layer, 0)


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
    callbacks = _hidden_losses(config, source, chunks)
    if config.correct.while_distilling and isinstance(source, LiveTeacher):
        correction = replace(config.correction, global_batch=batch)
        callbacks.append(TeacherCorrection(source.chunks, correction, checkpoints=NoCheckpoints()))
    callbacks.append(_Watch(there, cost, callbacks))
    with _keeping_layers(chunks, meter):
        tokens = _real_tokens(config.data.sequence_length + 1)
        distill(chunks, source, lambda number: tokens, cfg, callbacks, checkpoints=NoCheckpoints())
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


def memory_over_a_step(config: Config, teacher: Dims, student: Dims, world: int, rank: int) -> list[dict[str, int]]:
    """Return bytes by kind after each allocation or release of a step of the distill stage, with all layers.

    Micro-batches are as few as show how many are under way at once.
    """
    count = micro_batch_counts(config)[0]
    with fake_world(
        config.parallel, world=world, rank=rank, seed=config.run.seed, is_gpu=config.cluster.is_gpu
    ) as there:  # fmt: skip
        there.meter.curve = []
        curve = distilling(there, config, teacher, student, count).curve
    assert curve is not None
    return [kinds for _, kinds in curve]
