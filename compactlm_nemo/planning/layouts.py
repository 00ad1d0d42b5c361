"""Layouts of a run on a cluster: which of them fit, and how long a training step takes in each.

Every tensor-parallel size, micro-batch and choice of recomputation is simulated once, without a pipeline; stages are
made of that by arithmetic: a stage has its share of the layers, and as many micro-batches under way as stages follow.
The best are then simulated as they are, and what is shown of them is that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from compactlm_nemo.config.distill import Recompute
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.planning import simulate, trainings
from compactlm_nemo.planning.duration import duration
from compactlm_nemo.planning.estimate import estimated
from compactlm_nemo.planning.meter import TEMPORARY, Peak
from compactlm_nemo.planning.planned import planned_stages
from compactlm_nemo.planning.pool import side_by_side
from compactlm_nemo.planning.simulate import ACTIVATIONS, OPTIMIZER
from compactlm_nemo.search.cost import params_per_rank

SHOWN = 3
"""Layouts that are simulated as they are."""
MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """A layout that fits."""

    run: Config
    """The settings with this layout."""
    bytes: int
    """Peak of the fullest rank."""
    seconds_a_step: float


def found_layouts(
    run: Config, teacher: Dims, student: Dims, world: int, limit: float,
    advance: Callable[[], None] = lambda: None,
) -> list[Layout]:  # fmt: skip
    """Return the layouts whose distillation fits into `limit` bytes a rank, the fastest first.

    Nodes are given, so the fastest is the cheapest.
    """
    allowed: dict[tuple[int, Recompute], list[Config]] = {}
    for candidate in candidates(run, teacher, student, world):
        allowed.setdefault((candidate.parallel.tp, candidate.distill.recompute), []).append(candidate)
    plain = [each for (_, recompute), each in allowed.items() if recompute is Recompute.none]
    rough = _rough(plain, teacher, student, world, advance)
    best = min((each.seconds_a_step for each in rough if each.bytes <= limit), default=math.inf)
    # Recomputation takes time: it is of use where a layout is too large without that would else be faster.
    faster = {each.run.parallel.tp for each in rough if each.bytes > limit and each.seconds_a_step < best}
    others = [
        each for (tp, recompute), each in allowed.items() if recompute is not Recompute.none and tp in faster
    ]  # fmt: skip
    rough += _rough(others, teacher, student, world, advance)
    fitting = sorted((each for each in rough if each.bytes <= limit), key=_rank)
    exact = _as_they_are([each.run for each in fitting[:SHOWN]], teacher, student, world, advance)
    return sorted((each for each in exact if each.bytes <= limit), key=_rank) + fitting[SHOWN:]


def _rough(
    groups: list[list[Config]], teacher: Dims, student: Dims, world: int, advance: Callable[[], None]
) -> list[Layout]:
    """Return the layouts of groups of settings, each of which is simulated once."""
    simulated = side_by_side(_Simulated, [(first, teacher, student, world) for first, *_ in groups], advance)
    return [alone.layout(each) for alone, alike in zip(simulated, groups, strict=True) for each in alike]


def _rank(layout: Layout) -> tuple[float, int]:
    """Return what layouts are sorted by: time, and among equals the larger micro-batch, whose products are larger."""
    return layout.seconds_a_step, -layout.run.distill.micro_batch


def candidates(run: Config, teacher: Dims, student: Dims, world: int) -> Iterator[Config]:
    """Yield the run in every layout that the rules allow on these ranks."""
    per_node, batch = run.cluster.devices_per_node, run.distill.global_batch
    powers = [2**n for n in range(11)]
    for tp in (n for n in powers if n <= per_node):
        for pp in (n for n in powers if n <= min(16, student.num_layers)):
            if world % (tp * pp * run.parallel.cp):
                continue
            dp = world // (tp * pp * run.parallel.cp)
            layout = replace(
                run.parallel, tp=tp, pp=pp, sequence_parallel=tp > 1, virtual_stages=1, pp_split=[],
            )  # fmt: skip
            if dp % layout.ep or not _can_be_split(run, teacher, student, layout):
                continue
            for size in (n for n in MICRO_BATCHES if batch % (dp * n) == 0):
                for recompute in Recompute:
                    training = replace(
                        run.distill, micro_batch=size, recompute=recompute, overlap=True, teacher_tp=None,
                        teacher_pp=None,
                    )  # fmt: skip
                    yield replace(run, parallel=layout, distill=training)


def _can_be_split(run: Config, teacher: Dims, student: Dims, layout: ParallelConfig) -> bool:
    try:
        for dims in (teacher, student):
            params_per_rank(
                dims, layout=layout, chunk_layers=[1] * layout.num_chunks, vocab_multiple=run.model.vocab_multiple
            )
    except ConfigError:
        return False
    length = run.data.sequence_length
    return not layout.sequence_parallel or length // layout.cp % layout.tp == 0


def simulated_layout(run: Config, teacher: Dims, student: Dims, world: int) -> Layout:
    """Return the run's own layout by the search's arithmetic, of small simulations without a pipeline."""
    return _Simulated(run, teacher, student, world).layout(run)


class _Simulated:
    """What a step costs without a pipeline, from small simulations of one sample a micro-batch."""

    def __init__(self, run: Config, teacher: Dims, student: Dims, world: int) -> None:
        self.teacher, self.student, self.world = teacher, student, world
        self.alone = replace(run.parallel, pp=1)
        plain = replace(run, parallel=self.alone, distill=replace(run.distill, micro_batch=1))
        # The world is that of one copy, so that optimizer states are whole; they are divided below.
        self.costs = simulate.small_costs(
            trainings.distilling, plain, teacher, student, world=self.alone.model_ranks * self.alone.ep, rank=0,
            is_one_depth=teacher.num_layers == student.num_layers, is_gpu=run.cluster.is_gpu, few=1,
        )  # fmt: skip

    def layout(self, run: Config) -> Layout:
        """Return bytes and seconds of a layout: as many samples, in micro-batches of more."""
        layout, cfg = run.parallel, run.distill
        dp = self.world // layout.model_ranks
        samples = cfg.global_batch // dp
        teaching, taught = (-(-dims.num_layers // layout.pp) for dims in (self.teacher, self.student))
        counts = simulate.micro_batch_counts(replace(run, parallel=self.alone))
        cost = simulate.continued(self.costs, simulate.weights_of(teaching, taught, samples, counts, 1))
        times = duration(
            cost.work, run.cluster, layout, micro_batches=samples // cfg.micro_batch, overlap=cfg.overlap, trains=True
        )
        # Until the first step gradients and main weights bear no name by which a layout divides them.
        peaks = [peak for phase, peak in cost.peaks.items() if phase != trainings.START]
        peak = max(self._bytes(each, cfg.micro_batch, dp // layout.ep, layout.pp) for each in peaks)
        return Layout(run, peak, times.seconds)

    def _bytes(self, peak: Peak, size: int, dp: int, pp: int) -> int:
        """Return the bytes of the first stage, which has most micro-batches under way, at its fullest in a phase."""
        factor = {OPTIMIZER: 1 / dp, ACTIVATIONS: size * pp, TEMPORARY: size}
        return round(sum(count * factor.get(kind, 1) for kind, count in peak.by_kind.items()))


def planned_layout(run: Config, teacher: Dims, student: Dims, world: int) -> Layout:
    """Return the run's own layout, with what its training needs and takes when it is simulated as it is."""
    return _as_they_are([run], teacher, student, world)[0]


def _as_they_are(
    runs: list[Config], teacher: Dims, student: Dims, world: int, advance: Callable[[], None] = lambda: None
) -> list[Layout]:
    trainings_of_runs = [planned_stages(run, teacher, student, world)["distill"].parts[0] for run in runs]
    found = estimated(trainings_of_runs, teacher, student, world, advance)
    return [
        Layout(run, each.cost.peak.bytes, each.duration.seconds) for run, each in zip(runs, found, strict=True)
    ]  # fmt: skip
