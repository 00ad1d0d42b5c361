"""A stage of a run on a cluster: what its ranks need, and how long all of it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from compactlm_nemo.config.cluster import ClusterConfig
from compactlm_nemo.config.plan import PlannedRun
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import TeacherSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.layout import split_layers
from compactlm_nemo.planning import passes, simulate, trainings
from compactlm_nemo.planning.duration import Duration, duration
from compactlm_nemo.planning.simulate import Cost, Place, Simulation


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a stage has to do."""

    simulation: Simulation
    micro_batches: int
    """Of a rank: in a step where it trains, else altogether."""
    steps: int
    tokens: int
    """Of all ranks, in a step where it trains, else altogether."""
    trains: bool
    has_student: bool = False
    """Whether the student takes part, and not the teacher alone."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A row of the plan: of the fullest and of the slowest rank."""

    stage: str
    cost: Cost
    fullest: int
    """Pipeline stage whose rank needs most memory."""
    duration: Duration
    """Of a step where it trains, else of all."""
    planned: Planned
    flops: int
    """Of all ranks that hold one copy of the model, in a step where it trains, else altogether."""

    @property
    def seconds(self) -> float:
        return self.duration.seconds * self.planned.steps

    @property
    def tokens_per_second(self) -> float:
        return self.planned.tokens / self.duration.seconds

    def utilisation(self, cluster: ClusterConfig, ranks: int, copies: int) -> float:
        """Return the share of the devices' bf16 peak that its products are, recomputation included."""
        return self.flops * copies / (self.duration.seconds * ranks * cluster.bf16_tflops * 1e12)

    def as_values(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "stage": self.stage,
            "peak_bytes": self.cost.peak.bytes,
            "peak_bytes_by_kind": self.cost.peak.by_kind,
            "peak_at": self.cost.peak.place,
            "peak_phase": max(self.cost.peaks, key=lambda phase: self.cost.peaks[phase].bytes),
            "pipeline_stage": self.fullest,
            "checkpoint_bytes_a_rank": self.cost.kept_bytes,
            "flops": self.flops,
            "sent_bytes": {
                f"{name} over {size} of {group}": sent for (name, group, size), sent in self.cost.work.sent.items()
            },
            "seconds_a_step": asdict(self.duration),
            "steps": self.planned.steps,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def planned_stages(config: Config, world: int) -> dict[str, Planned]:
    """Return the stages of a run that need a device, in order, with what each has to do."""
    cfg, layout, length = config.distill, config.parallel, config.data.sequence_length
    dp = world // layout.model_ranks
    step_tokens = cfg.global_batch * length

    def one_pass(simulation: Simulation, samples: int, micro_batch: int, *, models: int = 1) -> Planned:
        return Planned(
            simulation=simulation, micro_batches=-(-samples // (dp * micro_batch)), steps=1,
            tokens=samples * length * models, trains=False, has_student=models > 1,
        )  # fmt: skip

    def training(simulation: Simulation, steps: int, *, has_student: bool) -> Planned:
        return Planned(
            simulation=simulation, micro_batches=cfg.global_batch // (dp * cfg.micro_batch), steps=steps,
            tokens=step_tokens, trains=True, has_student=has_student,
        )  # fmt: skip

    stages = {"score": one_pass(passes.scoring, config.score.samples, config.score.micro_batch)}
    if config.corrects_before:
        stages["correct_teacher"] = training(trainings.correcting, config.correct.steps, has_student=False)
    if cfg.teacher is TeacherSource.stored:
        shards, size = -(-config.cached_samples // config.cache.shard_samples), config.cache.shard_samples
        filled = -(-shards // dp) * dp * size  # every data-parallel rank runs equally many whole shards
        stages["cache_teacher"] = one_pass(passes.caching, filled, config.cache.micro_batch)
    stages["distill"] = training(trainings.distilling, cfg.steps, has_student=True)
    windows = config.evaluate.tokens // length * max(1, len(config.data.heldout))
    stages["evaluate"] = one_pass(passes.evaluating, windows, config.evaluate.micro_batch, models=3)
    return stages


def estimate(
    stage: str, planned: Planned, config: PlannedRun, teacher: Dims, student: Dims, *, world: int,
    advance: Callable[[], None] = lambda: None,
) -> Estimate:  # fmt: skip
    """Simulate a stage on one rank of each kind of pipeline stage, and return its row."""
    layout = config.parallel
    stages = sorted({0, min(1, layout.pp - 1), layout.pp - 1})
    costs: dict[int, Cost] = {}
    for pp_rank in stages:
        taught, teaching = (_layers(config, dims, pp_rank) for dims in (student, teacher))
        place = Place(
            world=world, rank=pp_rank * (world // layout.pp), teacher_layers=teaching,
            student_layers=taught if planned.has_student else teaching, micro_batches=planned.micro_batches,
            is_gpu=config.cluster.is_gpu,
        )  # fmt: skip
        costs[pp_rank] = simulate.simulate(planned.simulation, config, teacher, student, place)
        advance()
    times = {
        pp_rank: duration(
            cost.work, config.cluster, layout, micro_batches=planned.micro_batches, overlap=config.distill.overlap,
            trains=planned.trains,
        )
        for pp_rank, cost in costs.items()
    }  # fmt: skip
    fullest = max(costs, key=lambda pp_rank: costs[pp_rank].peak.bytes)
    slowest = max(times, key=lambda pp_rank: times[pp_rank].seconds)
    middle = costs[stages[len(stages) // 2]].work.total_flops * max(0, layout.pp - len(stages))
    flops = sum(cost.work.total_flops for cost in costs.values()) + middle
    return Estimate(
        stage=stage, cost=costs[fullest], fullest=fullest, duration=times[slowest], planned=planned,
        flops=flops * layout.tp * layout.cp,
    )  # fmt: skip


def _layers(config: Config, dims: Dims, pp_rank: int) -> int:
    """Return the layers of a chunk of a pipeline stage, the most where its chunks differ."""
    counts = split_layers(dims.num_layers, config.parallel)
    return max(counts[pp_rank :: config.parallel.pp])
