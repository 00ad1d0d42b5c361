"""A distillation step of the experiment's shapes, with as many layers as fit on this GPU: time, use, memory, shares.

A step is what the loop does: the teacher's forward pass, the student's forward and backward passes with the loss head,
over the micro-batches; then gradient norm and optimizer. Model FLOPs are three forward passes of the student and one of
the teacher, whatever is recomputed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.gpu import clock, models
from bench.gpu.clock import Spans
from bench.gpu.record import Record
from compactlm_nemo.config.schema import Config
from compactlm_nemo.distill import step as distill_step
from compactlm_nemo.distill.teacher import LiveTeacher
from compactlm_nemo.losses.targets import Targets
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.devices import device_name, peak_tflops
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.search.cost import flops_per_token_forward, num_params
from compactlm_nemo.stages.training_run import prepare_layers
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.optimizer import TrainableModel
from compactlm_nemo.training.tracker import LOSS

VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "not compiled": ("model.compile=false",),
    "recompute": ("distill.recompute=full",),
    "recompute selective": ("distill.recompute=selective",),
}
"""Name -> settings that differ from the experiment's."""
MICRO_BATCHES = 4
"""Of one sample each: a rank's share of the experiment's global batch on 288 GPUs."""
ROUNDS = 5
LEAST_MFU = 0.5
STUDENT_BYTES = 18
"""A student's parameter on one GPU: bf16 weight, float32 gradient, main weight and both moments."""
RESERVE_BYTES = 12 * 10**9
"""Left for the head, for what the optimizer's step needs, and for the allocator."""


class Shares(NamedTuple):
    """Milliseconds of one step, on the median."""

    step: float
    teacher: float
    head: float
    optimizer: float

    @property
    def student(self) -> float:
        """The student's layers, forward and backward, and what is between the parts."""
        return self.step - self.teacher - self.head - self.optimizer


class Subject:
    """A subject holds teacher, student and batches, and runs steps."""

    def __init__(self, config: Config, mesh: Mesh, teacher: Dims, student: Dims) -> None:
        self.cfg, self.spans, run = config.distill, Spans(), models.run_on(config, mesh)
        pair = [models.random_model(run, dims) for dims in (teacher, student)]
        for chunks in pair:
            prepare_layers(run, config.distill, chunks)
        self.teacher = _TimedTeacher(pair[0], self.spans)
        self.model = TrainableModel(pair[1].train(), config.distill)
        tokens = models.random_tokens(student, MICRO_BATCHES, config.data.sequence_length + 1)
        self.batches = [Batch(part, ()) for part in tokens.split(1)]
        self.loss = 0.0

    def step(self) -> None:
        """Run one step of the loop."""
        with self.spans.span("step"):
            self.model.advance_schedule()
            terms = distill_step.forward_backward(
                self.model.ddps, self.teacher, self.batches, loss=self.cfg.loss, temperature=self.cfg.temperature
            )
            self.loss = terms[LOSS]
            with self.spans.span("optimizer"):
                self.model.update(self.model.gradient_norm())

    def shares(self) -> Shares:
        """Run one step and return its parts."""
        head = distill_step.linear_kd

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.spans.span("head"):  # gradients are made in its forward pass; backward only scales them
                return head(*args, **kwargs)

        self.spans.milliseconds()
        with mock.patch.object(distill_step, "linear_kd", timed):
            self.step()
        return Shares(**self.spans.milliseconds())


class _TimedTeacher(LiveTeacher):
    def __init__(self, chunks: Any, spans: Spans) -> None:
        super().__init__(chunks)
        self.spans = spans

    def targets(self, batches: list[Batch]) -> Sequence[Targets]:
        with self.spans.span("teacher"):
            return super().targets(batches)


def measure(record: Record, *, dry: bool) -> None:
    """Record every variant, in the number of layers that the default one has room for."""
    config = models.settings(dry=dry)
    teacher, student = models.shapes(config, dry=dry)
    layers = teacher.num_layers if dry else layers_that_fit(teacher, student, config.data.sequence_length)
    needed = 0.0
    with launched(config.parallel, seed=1) as mesh:
        for name, overrides in VARIANTS.items():
            if record.seconds_left() < 1.5 * needed:
                record.failed(name, TimeoutError(f"left out, {record.seconds_left():.0f} s were left"))
                continue
            before = record.seconds_left()
            try:
                layers = _variant(record, name, models.settings(*overrides, dry=dry), mesh, teacher, student, layers)
            except Exception as error:
                record.failed(name, error)
            clock.free()
            needed = max(needed, before - record.seconds_left())


def layers_that_fit(teacher: Dims, student: Dims, tokens: int) -> int:
    """Return how many layers of both models train on this GPU, without recomputation, `tokens` at a time."""

    def room(layers: int) -> float:
        weights = 2 * num_params(teacher.with_shape(layers=layers)) + STUDENT_BYTES * num_params(
            student.with_shape(layers=layers)
        )
        hidden = 8 * student.hidden_size + 2 * (student.num_heads + 2 * student.num_query_groups) * student.head_dim
        return weights + layers * 2 * tokens * (hidden + 5 * student.ffn_hidden_size)

    free = torch.cuda.mem_get_info()[0] - RESERVE_BYTES
    fitting = [layers for layers in range(1, student.num_layers + 1) if room(layers) <= free]
    return fitting[-1] if fitting else 1


def _variant(record: Record, name: str, config: Config, mesh: Mesh, teacher: Dims, student: Dims, layers: int) -> int:
    """Record one variant; returns the layers, which are fewer than asked for where memory ran out."""
    while True:
        sizes = (teacher.with_shape(layers=layers), student.with_shape(layers=layers))
        try:
            _measure(record, name, config, mesh, *sizes, all_layers=(teacher, student))
            return layers
        except torch.OutOfMemoryError as error:
            if layers == 1:
                raise
            record.failed(f"{name}, {layers} layers", error)
            layers = max(1, layers * 3 // 4)
        clock.free()  # outside of the handler, whose traceback holds the models


def _measure(
    record: Record,
    name: str,
    config: Config,
    mesh: Mesh,
    teacher: Dims,
    student: Dims,
    *,
    all_layers: tuple[Dims, Dims],
) -> None:
    subject = Subject(config, mesh, teacher, student)
    first = clock.milliseconds(subject.step)
    peak = clock.peak_bytes(subject.step)
    times = clock.in_turn({"step": subject.step}, ROUNDS, record.seconds_left)["step"]
    parts = [subject.shares() for _ in range(3)]
    shares = Shares(*(statistics.median(values) for values in zip(*parts, strict=True)))
    if not torch.isfinite(torch.tensor(subject.loss)):
        raise FloatingPointError(f"the loss is {subject.loss}")
    tokens, length = MICRO_BATCHES * config.data.sequence_length, config.data.sequence_length
    median, label = statistics.median(times), f"{name}, {student.num_layers} layers"
    record.detail(label, {"first ms": first, "ms": times, "loss": subject.loss, "shares ms": shares._asdict()})
    record.figure(label, median, "ms a step")
    record.figure(label, tokens / median * 1000, "tokens/s")
    goals: dict[str, Any] = {"at_least": LEAST_MFU} if name == "default" else {}
    peak_speed = peak_tflops(device_name())
    if peak_speed:
        record.figure(f"{label}: MFU", _flops(teacher, student, length) * tokens / median / 1e9 / peak_speed, **goals)
        whole = _flops(*all_layers, length) * tokens / _at_all_layers(shares, student, all_layers[1]) / 1e9
        record.figure(f"{label}: MFU at {all_layers[1].num_layers} layers, predicted", whole / peak_speed)
    if peak is not None:
        record.figure(f"{label}: peak memory", models.gigabytes(torch.cuda.max_memory_allocated()), "GB")
        record.figure(f"{label}: of that beside weights and optimizer", models.gigabytes(peak), "GB")
    for part in ("teacher", "student", "head", "optimizer"):
        record.figure(f"{label}: {part}", 100 * getattr(shares, part) / shares.step, "% of the step")


def _flops(teacher: Dims, student: Dims, length: int) -> int:
    """Return model FLOPs of a token: a backward pass is two forward ones."""
    return 3 * flops_per_token_forward(student, length) + flops_per_token_forward(teacher, length)


def _at_all_layers(shares: Shares, student: Dims, whole: Dims) -> float:
    """Return the milliseconds of a step of the whole models: layers in proportion, the optimizer by parameters."""
    ratio, params = whole.num_layers / student.num_layers, num_params(whole) / num_params(student)
    return (shares.teacher + shares.student) * ratio + shares.head + shares.optimizer * params
