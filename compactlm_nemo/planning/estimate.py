"""A stage of a run on a cluster: what its ranks need, and how long all of it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from compactlm_nemo.config.cluster import ClusterConfig
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.layout import split_layers
from compactlm_nemo.planning import simulate
from compactlm_nemo.planning.duration import Duration, duration
from compactlm_nemo.planning.meter import Peak
from compactlm_nemo.planning.planned import Part, Planned
from compactlm_nemo.planning.pool import side_by_side
from compactlm_nemo.planning.simulate import FILE, HOST, Cost, Place
from compactlm_nemo.planning.storage import Storage, storage


@dataclass(frozen=True, kw_only=True)
class PartEstimate:
    """A part of a stage: of the fullest and of the slowest rank."""

    part: Part
    cost: Cost
    fullest: int
    """Pipeline stage whose rank needs most memory."""
    duration: Duration
    """Of one time."""
    flops: int
    """Of all ranks that hold one copy of the model, one time."""

    @property
    def seconds(self) -> float:
        return self.duration.seconds * self.part.times

    def utilisation(self, cluster: ClusterConfig, ranks: int, copies: int) -> float:
        """Return the share of the devices' bf16 peak that its products are, recomputation included."""
        return self.flops * copies / (self.duration.seconds * ranks * cluster.bf16_tflops * 1e12)

    def as_values(self) -> dict[str, Any]:
        """Return it as plain values."""
        peak = self.cost.peak
        return {
            "part": self.part.name,
            "peak_bytes": peak.bytes,
            "peak_bytes_by_kind": peak.by_kind,
            "peak_at": peak.place,
            "peak_phase": max(self.cost.peaks, key=lambda phase: self.cost.peaks[phase].bytes),
            "pipeline_stage": self.fullest,
            "flops": self.flops,
            "sent_bytes": {
                f"{name} over {size} of {group}": sent for (name, group, size), sent in self.cost.work.sent.items()
            },
            "times": self.part.times,
            "tokens": self.part.tokens,
            "seconds_each_time": asdict(self.duration),
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A row of the plan."""

    stage: str
    parts: list[PartEstimate]
    storage: Storage

    @property
    def peak(self) -> Peak:
        """The fullest moment of its parts; nothing where it needs no device."""
        return max((each.cost.peak for each in self.parts), key=lambda peak: peak.bytes, default=Peak())

    @property
    def duration(self) -> Duration:
        """Of all of it."""
        whole = Duration(0.0, 0.0, 0.0, 0.0, 0.0)
        for each in self.parts:
            whole = whole.plus(each.duration, each.part.times)
        return whole

    @property
    def seconds(self) -> float:
        return self.duration.seconds + self.storage.storage_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of the part that takes most time; 0 where nothing is computed."""
        main = max(self.parts, key=lambda each: each.seconds, default=None)
        return main.part.tokens / main.duration.seconds if main and main.duration.seconds else 0.0

    def utilisation(self, cluster: ClusterConfig, ranks: int, copies: int) -> float:
        """Return the share of the devices' bf16 peak that its products are, recomputation included."""
        flops = sum(each.flops * each.part.times for each in self.parts)
        return flops * copies / (self.seconds * ranks * cluster.bf16_tflops * 1e12) if self.seconds else 0.0

    def as_values(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "stage": self.stage,
            "peak_bytes": self.peak.bytes,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            **asdict(self.storage),
            "parts": [each.as_values() for each in self.parts],
        }


def estimates(
    stages: list[Planned], config: Config, teacher: Dims, student: Dims, *, world: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Estimate]:  # fmt: skip
    """Simulate the parts of all stages side by side, and return a row for each."""
    parts = [part for stage in stages for part in stage.parts]
    found = iter(side_by_side(estimate_part, [(part, teacher, student, world) for part in parts], advance))
    return [
        joined(stage, [next(found) for _ in stage.parts], config, teacher, student, world) for stage in stages
    ]  # fmt: skip


def joined(
    planned: Planned, parts: list[PartEstimate], config: Config, teacher: Dims, student: Dims, world: int
) -> Estimate:
    """Return the row of a stage of its parts."""
    kept = max((each.cost.kept_bytes for each in parts), default=0)
    return Estimate(
        stage=planned.name, parts=parts, storage=storage(planned.name, config, teacher, student, kept, world=world)
    )


def estimate(planned: Planned, config: Config, teacher: Dims, student: Dims, *, world: int) -> Estimate:
    """Simulate a stage in this process, and return its row."""
    parts = [estimate_part(part, teacher, student, world) for part in planned.parts]
    return joined(planned, parts, config, teacher, student, world)


def estimate_part(part: Part, teacher: Dims, student: Dims, world: int) -> PartEstimate:
    """Simulate a part on one rank of each kind of pipeline stage."""
    config, layout = part.config, part.config.parallel
    costs: dict[int, Cost] = {}
    for rank in _ranks(config, world):
        teaching = _layers(config.teacher_parallel, teacher, _stage(rank, config.teacher_parallel, world))
        taught = _layers(layout, student, _stage(rank, layout, world))
        place = Place(
            world=world, rank=rank, micro_batches=part.micro_batches, is_gpu=config.cluster.is_gpu,
            teacher_layers=teaching if part.has_teacher else taught,
            student_layers=taught if part.has_student else teaching,
        )  # fmt: skip
        cost = simulate.simulate(part.simulation, config, teacher, student, place, part.degree, part.few)
        costs[rank] = without_host(cost) if config.cluster.is_gpu else cost
    times = {
        rank: duration(
            cost.work, config.cluster, layout, micro_batches=part.micro_batches, overlap=config.distill.overlap,
            trains=part.trains,
        )
        for rank, cost in costs.items()
    }  # fmt: skip
    fullest = max(costs, key=lambda rank: costs[rank].peak.bytes)
    slowest = max(times, key=lambda rank: times[rank].seconds)
    return PartEstimate(
        part=part, cost=costs[fullest], fullest=_stage(fullest, layout, world), duration=times[slowest],
        flops=_flops({rank: cost.work.total_flops for rank, cost in costs.items()}, layout, world),
    )  # fmt: skip


def without_host(cost: Cost) -> Cost:
    """Return what a device holds: a parameter as it was read, and states that wait, are on the host."""
    for phase, peak in cost.peaks.items():
        held = {kind: size for kind, size in peak.by_kind.items() if kind not in (FILE, HOST)}
        cost.peaks[phase] = Peak(sum(held.values()), held, peak.place)
    return cost


def _ranks(config: Config, world: int) -> list[int]:
    """Return a rank of each kind: the first of the first, second and last stage of either model."""
    ranks = set()
    for layout in (config.parallel, config.teacher_parallel):
        ranks |= {stage * (world // layout.pp) for stage in (0, min(1, layout.pp - 1), layout.pp - 1)}
    return sorted(ranks)


def _stage(rank: int, layout: ParallelConfig, world: int) -> int:
    return rank // (world // layout.pp)


def _flops(flops: dict[int, int], layout: ParallelConfig, world: int) -> int:
    """Return the FLOPs of all ranks with one copy of the model: stages that were not simulated are as the second."""
    of_stage = {_stage(rank, layout, world): count for rank, count in flops.items()}
    whole = sum(of_stage.get(stage, of_stage[min(1, layout.pp - 1)]) for stage in range(layout.pp))
    return whole * layout.tp * layout.cp


def _layers(layout: ParallelConfig, dims: Dims, stage: int) -> int:
    """Return the layers of a chunk of a pipeline stage, the most where its chunks differ."""
    return max(split_layers(dims.num_layers, layout)[stage :: layout.pp])
