"""Each stage's heavy part, run by the package's own code on a fake world, and what it takes.

A stage is simulated with few layers a chunk and few micro-batches a rank, and continued to all of them: every count
grows linearly with either, and so do the bytes of every phase, whose largest is the peak. Phases are short enough that
the peak of each stays at one place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import StoredKind, TeacherSource
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.teacher import LiveTeacher, NoTeacher, Teacher
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.moments import MomentCollector
from compactlm_nemo.losses.targets import Targets, TeacherHead, TopK
from compactlm_nemo.losses.vocabulary import chunk_tokens
from compactlm_nemo.models.build import ModelChunks, build_model
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.planning.fake_world import FakeWorld, fake_world
from compactlm_nemo.planning.meter import Peak, Work
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.callbacks import Callback, ModelPass, Step
from compactlm_nemo.training.checkpoint import Checkpoints
from compactlm_nemo.training.optimizer import TrainableModel

TEACHER, STUDENT, ACTIVATIONS = "teacher", "parameters", "activations"
GRADIENTS, OPTIMIZER, TARGETS, SCORES = "gradients", "optimizer", "targets", "scores"

FEWEST_LAYERS = 2
"""Layers of a chunk in the smaller simulation; the larger has one more. With one the first layer would be the last."""


@dataclass
class Cost:
    """What one rank needs and does: for training a step, else for the data that the simulation was given."""

    peaks: dict[str, Peak] = field(default_factory=dict)
    """Phase -> its fullest moment."""
    work: Work = field(default_factory=Work)
    kept_bytes: int = 0
    """What a checkpoint of this rank holds."""

    @property
    def peak(self) -> Peak:
        return max(self.peaks.values(), key=lambda peak: peak.bytes)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank of a cluster, and how many layers and micro-batches it has."""

    world: int
    rank: int
    teacher_layers: int
    """Of each of its chunks of the teacher."""
    student_layers: int
    micro_batches: int
    is_gpu: bool = False


class Point(NamedTuple):
    """A small simulation: layers of a chunk of both models, and micro-batches of a rank."""

    teacher_layers: int
    student_layers: int
    micro_batches: int


Simulation = Callable[[FakeWorld, Config, Dims, Dims, int], Cost]
"""(world, settings, teacher, student, micro-batches of a rank) -> cost; both models have as many layers as they say."""


def weights_of(
    teacher: int, student: int, micro_batches: int, counts: tuple[int, int], few: int = FEWEST_LAYERS
) -> dict[Point, float]:
    """Return the small simulations, and the weight of each in the sum that continues them.

    Args:
        teacher: Layers of a chunk of the teacher; as many of the `student`.
        counts: The two numbers of micro-batches that are simulated.
        few: The smaller of the two numbers of layers.
    """
    more = few + 1
    if teacher == student:
        layers = {(few, few): 1.0 - (student - few), (more, more): float(student - few)}
    else:
        layers = {
            (few, few): 1.0 - (teacher - few) - (student - few),
            (more, few): float(teacher - few),
            (few, more): float(student - few),
        }
    share = (micro_batches - counts[0]) / (counts[1] - counts[0])
    return {
        Point(*pair, count): weight * part
        for pair, weight in layers.items()
        for count, part in zip(counts, (1 - share, share), strict=True)
    }


def continued(costs: Mapping[Point, Cost], weights: Mapping[Point, float]) -> Cost:
    """Return the weighted sum of costs."""
    work, kept = Work(), 0.0
    for point, weight in weights.items():
        work, kept = work.plus(costs[point].work, weight), kept + weight * costs[point].kept_bytes
    largest = costs[max(weights)]
    peaks = {
        phase: _sum_of_peaks([(costs[point].peaks[phase], weight) for point, weight in weights.items()], peak.place)
        for phase, peak in largest.peaks.items()
    }
    return Cost(peaks, work, round(kept))


def _sum_of_peaks(parts: list[tuple[Peak, float]], place: str) -> Peak:
    kinds = {kind for peak, _ in parts for kind in peak.by_kind}
    by_kind = {kind: round(sum(peak.by_kind.get(kind, 0) * weight for peak, weight in parts)) for kind in kinds}
    return Peak(sum(by_kind.values()), {kind: size for kind, size in by_kind.items() if size > 0}, place)


def micro_batch_counts(layout: ParallelConfig) -> tuple[int, int]:
    """Return the two numbers of micro-batches that are simulated.

    The smaller is one more than are under way at once in a pipeline, so that one begins when one has ended; interleaved
    they come in rounds of one a stage.
    """
    if layout.virtual_stages > 1:
        return 2 * layout.pp, 3 * layout.pp
    return (1, 2) if layout.pp == 1 else (layout.pp + 1, layout.pp + 2)


def simulate(simulation: Simulation, config: Config, teacher: Dims, student: Dims, place: Place) -> Cost:
    """Return what a stage takes on a rank, continued from small simulations."""
    costs = small_costs(
        simulation, config, teacher, student, world=place.world, rank=place.rank,
        is_one_depth=place.teacher_layers == place.student_layers, is_gpu=place.is_gpu,
    )  # fmt: skip
    counts = micro_batch_counts(config.parallel)
    return continued(costs, weights_of(place.teacher_layers, place.student_layers, place.micro_batches, counts))


def small_costs(
    simulation: Simulation, config: Config, teacher: Dims, student: Dims, *, world: int, rank: int, is_one_depth: bool,
    is_gpu: bool = False, few: int = FEWEST_LAYERS,
) -> dict[Point, Cost]:  # fmt: skip
    """Return the cost of every small simulation; of those that models of one depth need, or all."""
    layout = config.parallel
    counts = micro_batch_counts(layout)
    costs = {}
    for point in weights_of(few, few if is_one_depth else few + 1, counts[0], counts, few):
        teaching, taught = (
            dims.keep_layers(_first(dims, layers * layout.num_chunks))
            for dims, layers in zip((teacher, student), point[:2], strict=True)
        )
        with fake_world(layout, world=world, rank=rank, seed=config.run.seed, is_gpu=is_gpu) as there:
            costs[point] = simulation(there, config, teaching, taught, point.micro_batches)
    return costs


def _first(dims: Dims, count: int) -> list[int]:
    """Return `count` layers of a model, which begins anew where it has fewer."""
    return [layer % dims.num_layers for layer in range(count)]


def _build(there: FakeWorld, config: Config, dims: Dims, kind: str) -> ModelChunks:
    """Return this rank's part of a model, whose weights are of a kind."""
    dtype = torch.bfloat16 if config.model.precision.name == "bf16" else torch.float32
    rows = dims.padded_vocab(there.mesh.tp_size, config.model.vocab_multiple) // there.mesh.tp_size
    place = torch.device("cuda" if there.is_gpu else "cpu")
    tokens = chunk_tokens(config.distill.loss_memory_mib, rows, dims.hidden_size, dtype=dtype, device=place)
    chunks = build_model(dims, there.mesh, dtype=dtype, vocab_multiple=config.model.vocab_multiple, chunk_tokens=tokens)
    if config.data.mask_documents:
        for chunk in chunks:
            chunk.document_end = 0
    there.meter.name(chunks.parameters(), kind)
    return chunks


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
        self._end_phase("student")

    def after_update(self, step: Step) -> None:
        self.model = step.model
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
        return LiveTeacher(_build(there, config, dims, TEACHER))
    head = None
    if config.cache.kind is StoredKind.hidden and there.mesh.is_last_stage:
        dtype = torch.bfloat16 if config.model.precision.name == "bf16" else torch.float32
        head = torch.empty(dims.padded_vocab(there.mesh.tp_size, config.model.vocab_multiple), dims.hidden_size)
        head = head[: head.shape[0] // there.mesh.tp_size].to(dtype, copy=True)
        there.meter.name([head], TEACHER)
    return _StoredTeacher(config, dims, there, head)


def train(there: FakeWorld, config: Config, cfg: DistillConfig, teacher: Dims, student: Dims, count: int) -> Cost:
    """Take two steps of a training, and return the cost of the second."""
    cost, meter = Cost(), there.meter
    source = _teacher(there, config, cfg, teacher)
    chunks = _build(there, config, student, STUDENT)
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


@contextlib.contextmanager
def _one_pass(there: FakeWorld, cost: Cost) -> Iterator[None]:
    """Count the body as one phase."""
    there.meter.start_work()
    there.meter.start_peak()
    yield
    cost.peaks["pass"], cost.work = there.meter.peak, there.meter.work


def scoring(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Score `count` micro-batches of a rank with every metric that was chosen, second moments included."""
    cfg, cost = config.score, Cost()
    chunks = _build(there, config, teacher, TEACHER).eval()
    windows = torch.zeros(count * there.mesh.dp_size * cfg.micro_batch, config.data.sequence_length, dtype=torch.long)
    moments = MomentCollector(chunks, experts=cfg.expert_moments) if cfg.second_moments else None
    there.meter.keep(SCORES)
    with _one_pass(there, cost):
        if moments is not None:
            collect(chunks, windows, cfg, lambda samples: None, moments.on_batch)
        else:
            collect(chunks, windows, cfg, lambda samples: None)
    return cost


def caching(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Run the teacher over `count` micro-batches of a rank, as the cache_teacher stage does."""
    cost = Cost()
    chunks = _build(there, config, teacher, TEACHER).eval()
    size, length = config.distill.micro_batch, config.data.sequence_length
    batches = [torch.zeros(size, length, dtype=torch.long) for _ in range(count)]
    with _one_pass(there, cost):
        forward_each(chunks, batches, lambda idx, hidden_SBG: None)
    return cost


def evaluating(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Measure the teacher's loss on `count` micro-batches of a rank."""
    cost, size = Cost(), config.evaluate.micro_batch
    chunks = _build(there, config, teacher, TEACHER).eval()
    windows = torch.zeros(count * there.mesh.dp_size * size, config.data.sequence_length + 1, dtype=torch.long)
    with _one_pass(there, cost):
        evaluate_lm_loss(chunks, windows, micro_batch=size, progress=lambda samples: None)
    return cost
