"""Each stage's heavy part, run by the package's own code on a fake world, and what it takes.

A stage is simulated with few layers a chunk and few micro-batches a rank, and continued to all of them: every count
grows linearly with either, and so do the bytes of every phase, whose largest is the peak. Phases are short enough that
the peak of each stays at one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import torch

from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import TeacherSource
from compactlm_nemo.losses.vocabulary import chunk_tokens
from compactlm_nemo.models.build import ModelChunks, build_model
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.planning.fake_world import FakeWorld, fake_world
from compactlm_nemo.planning.meter import Peak, Work

TEACHER, STUDENT, ACTIVATIONS = "teacher", "parameters", "activations"
GRADIENTS, OPTIMIZER, TARGETS, SCORES, FILE = "gradients", "optimizer", "targets", "scores", "file"
HOST = "host"
"""Final states of held-out tokens, which wait on the host."""

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
    curve: list[tuple[int, dict[str, int]]] | None = None
    """(bytes alive, by kind) after each allocation and release of a training step, where it was asked for."""

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
    teacher: int, student: int, micro_batches: int, counts: tuple[int, int], few: int = FEWEST_LAYERS, degree: int = 1
) -> dict[Point, float]:
    """Return the small simulations, and the weight of each in the sum that continues them.

    Args:
        teacher: Layers of a chunk of the teacher; as many of the `student`.
        counts: The two numbers of micro-batches that are simulated.
        few: The smallest number of layers.
        degree: Of the polynomial in the layers that every count is; 2 where both models have equally many.
    """
    if teacher == student:
        nodes = range(few, few + degree + 1)
        layers = {(node, node): _lagrange(teacher, node, nodes) for node in nodes}
    else:
        layers = {
            (few, few): 1.0 - (teacher - few) - (student - few),
            (few + 1, few): float(teacher - few),
            (few, few + 1): float(student - few),
        }
    share = (micro_batches - counts[0]) / (counts[1] - counts[0])
    return {
        Point(*pair, count): weight * part
        for pair, weight in layers.items()
        for count, part in zip(counts, (1 - share, share), strict=True)
    }


def _lagrange(x: float, node: int, nodes: range) -> float:
    """Return the weight of a node's value in that of the polynomial through all nodes at x."""
    return math.prod((x - other) / (node - other) for other in nodes if other != node)


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


def micro_batch_counts(config: Config) -> tuple[int, int]:
    """Return the two numbers of micro-batches that are simulated.

    The smaller is one more than are under way at once in a pipeline, so that one begins when one has ended; interleaved
    they come in rounds of one a stage. Ranks of a teacher in a layout of its own get equally many in both.
    """
    layout, own = config.parallel, config.teacher_parallel
    if layout.virtual_stages > 1:
        return 2 * layout.pp, 3 * layout.pp
    first = 1 if layout.pp == 1 else layout.pp + 1
    if own == layout or config.distill.teacher is not TeacherSource.live:
        return first, first + 1
    whole = Fraction(layout.model_ranks, own.model_ranks).numerator
    first = -(-first // whole) * whole
    return first, first + whole


def simulate(
    simulation: Simulation, config: Config, teacher: Dims, student: Dims, place: Place, degree: int = 1,
    few: int = FEWEST_LAYERS,
) -> Cost:  # fmt: skip
    """Return what a stage takes on a rank, continued from small simulations."""
    costs = small_costs(
        simulation, config, teacher, student, world=place.world, rank=place.rank,
        is_one_depth=place.teacher_layers == place.student_layers, is_gpu=place.is_gpu, degree=degree,
        few=few,
    )  # fmt: skip
    weights = weights_of(
        place.teacher_layers, place.student_layers, place.micro_batches, micro_batch_counts(config), few, degree
    )
    return continued(costs, weights)


def small_costs(
    simulation: Simulation, config: Config, teacher: Dims, student: Dims, *, world: int, rank: int, is_one_depth: bool,
    is_gpu: bool = False, few: int = FEWEST_LAYERS, degree: int = 1,
) -> dict[Point, Cost]:  # fmt: skip
    """Return the cost of every small simulation; of those that models of one depth need, or all."""
    counts, layouts = micro_batch_counts(config), (config.teacher_parallel, config.parallel)
    costs = {}
    for point in weights_of(few, few if is_one_depth else few + 1, counts[0], counts, few, degree):
        teaching, taught = (
            dims.keep_layers(_first(dims, layers * layout.num_chunks))
            for dims, layers, layout in zip((teacher, student), point[:2], layouts, strict=True)
        )
        with fake_world(config.parallel, world=world, rank=rank, seed=config.run.seed, is_gpu=is_gpu) as there:
            costs[point] = simulation(there, config, teaching, taught, point.micro_batches)
    return costs


def _first(dims: Dims, count: int) -> list[int]:
    """Return `count` layers of a model, which begins anew where it has fewer."""
    return [layer % dims.num_layers for layer in range(count)]


def dtype_of(config: Config) -> torch.dtype:
    """Return the dtype of the weights."""
    return torch.bfloat16 if config.model.precision.name == "bf16" else torch.float32


def build(there: FakeWorld, config: Config, dims: Dims, kind: str, mesh: Mesh | None = None) -> ModelChunks:
    """Return this rank's part of a model, whose weights are of a kind; on a mesh of its own if one is given."""
    mesh = mesh or there.mesh
    rows = dims.padded_vocab(mesh.tp_size, config.model.vocab_multiple) // mesh.tp_size
    place = torch.device("cuda" if there.is_gpu else "cpu")
    dtype = dtype_of(config)
    tokens = chunk_tokens(config.distill.loss_memory_mib, rows, dims.hidden_size, dtype=dtype, device=place)
    chunks = build_model(dims, mesh, dtype=dtype, vocab_multiple=config.model.vocab_multiple, chunk_tokens=tokens)
    if config.data.mask_documents:
        for chunk in chunks:
            chunk.document_end = 0
    there.meter.name(chunks.parameters(), kind)
    with torch.no_grad():
        for parameter in chunks.parameters():
            parameter.zero_()  # on real ranks losses are finite then
    return chunks
