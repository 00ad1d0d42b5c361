"""What each stage of a run gives its devices to do: parts that are simulated, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from compactlm_nemo.config.prune import Blocks, Reconstruct
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.score import DepthMetric, WidthMetric
from compactlm_nemo.config.teacher import TeacherSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.planning import passes, trainings
from compactlm_nemo.planning.simulate import FEWEST_LAYERS, Simulation


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that is done a number of times."""

    name: str
    simulation: Simulation
    config: Config
    """The settings, as far as this part is concerned."""
    micro_batches: int
    """Of a rank, each time."""
    tokens: int
    """Of all ranks, each time."""
    times: float = 1
    trains: bool = False
    has_teacher: bool = True
    """Whether the teacher takes part."""
    has_student: bool = False
    """Whether the student takes part."""
    degree: int = 1
    """Of the polynomial in the layers that its costs are."""
    few: int = FEWEST_LAYERS
    """Layers from which on they are."""


@dataclass(frozen=True)
class Planned:
    """A stage."""

    name: str
    parts: list[Part] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What it does that is not planned."""


def planned_stages(config: Config, teacher: Dims, student: Dims, world: int) -> dict[str, Planned]:
    """Return the stages of a run that need a device, in order."""
    plan = _Plan(config, world)
    stages = [plan.import_model()]
    if config.data.has_generated:
        stages.append(Planned("generate", left_out=["generate: the documents, which grow token by token"]))
    stages += [plan.score(), plan.search(teacher, student)]
    if config.rank.candidates:
        stages.append(plan.rank(teacher, student))
    stages.append(plan.prune(teacher, student, "prune"))
    if config.corrects_before:
        stages.append(plan.correct_teacher())
    if config.distill.teacher is TeacherSource.stored:
        stages.append(plan.cache_teacher())
    stages += [plan.distill(), plan.evaluate(), Planned("export")]
    if config.profile.engines:
        stages.append(Planned("profile", left_out=["profile: the answers, which other programs time"]))
    return {stage.name: stage for stage in stages}


@dataclass(frozen=True)
class _Plan:
    config: Config
    world: int

    def _pass(
        self, name: str, simulation: Simulation, samples: int, micro_batch: int, *, times: float = 1, degree: int = 1,
        few: int = FEWEST_LAYERS, has_teacher: bool = True, has_student: bool = False,
    ) -> Part:  # fmt: skip
        dp = self.world // self.config.parallel.model_ranks
        return Part(
            name=name, simulation=simulation, config=_in_one_layout(self.config), times=times, degree=degree, few=few,
            micro_batches=-(-samples // (dp * micro_batch)), tokens=samples * self.config.data.sequence_length,
            has_teacher=has_teacher, has_student=has_student,
        )  # fmt: skip

    def _training(
        self, name: str, simulation: Simulation, config: Config, steps: int, *, has_student: bool, has_teacher: bool
    ) -> Part:
        cfg = config.distill
        dp = self.world // config.parallel.model_ranks
        return Part(
            name=name, simulation=simulation, config=config, micro_batches=cfg.global_batch // (dp * cfg.micro_batch),
            tokens=cfg.global_batch * config.data.sequence_length, times=steps, trains=True, has_teacher=has_teacher,
            has_student=has_student,
        )  # fmt: skip

    def import_model(self) -> Planned:
        return Planned("import_model", [replace(self._pass("read", passes.loading, 1, 1), tokens=0)])

    def score(self) -> Planned:
        cfg, parts, left_out = self.config.score, [], []
        few = cfg.depth_samples or cfg.samples

        def walk(name: str, *, block: int = 1, losses: bool, logits: bool, times: int = 1) -> Part:
            walking = passes.leaving_out(block, losses=losses, logits=logits)
            return self._pass(
                name, walking, few, cfg.micro_batch, times=times, degree=2, few=max(FEWEST_LAYERS, block)
            )  # fmt: skip

        if DepthMetric.bi in cfg.depth or any(metric.pair for metric in cfg.width) or cfg.second_moments:
            parts.append(self._pass("activations", passes.scoring, cfg.samples, cfg.micro_batch))
        if WidthMetric.taylor in cfg.width:
            parts.append(self._pass("taylor", passes.differentiating, cfg.samples, cfg.micro_batch))
        if DepthMetric.bi_blocks in cfg.depth:
            parts.append(self._pass("bi_blocks", passes.comparing_blocks, cfg.samples, cfg.micro_batch))
        loss, logits = DepthMetric.lm_loss in cfg.depth, DepthMetric.logit_mse in cfg.depth
        iterates = DepthMetric.logit_mse_iterative in cfg.depth
        if loss or logits or iterates:
            parts.append(walk("left_out", losses=loss, logits=logits or iterates))
        if iterates and cfg.iterations > 1:  # later walks are over fewer layers: this is their most
            parts.append(walk("left_out again", losses=False, logits=True, times=cfg.iterations - 1))
        if DepthMetric.lm_loss_blocks in cfg.depth:
            parts += [walk(f"{n}_left_out", block=n, losses=True, logits=False) for n in cfg.block_lengths]
        if DepthMetric.tasks in cfg.depth:
            left_out.append("score: the tasks without layers, which lm-eval runs on one rank")
        return Planned("score", parts, left_out)

    def _cut(self, teacher: Dims, student: Dims, times: float = 1) -> list[Part]:
        """Return what a cut runs on devices, and the measurement of its student's loss."""
        config, parts = self.config, []
        samples, size = config.score.samples, config.score.micro_batch
        refits = config.prune.reconstruct is not Reconstruct.none
        if refits and student.num_layers < teacher.num_layers and not (teacher.num_experts or teacher.norm_after):
            parts.append(self._pass("replace layers", passes.scoring, samples, size, times=times))
        size = config.evaluate.micro_batch
        losses = passes.students_loss
        return [
            *parts,
            self._pass("loss", losses, config.prune.samples, size, times=times, has_teacher=False, has_student=True),
        ]

    def _refit(self, stage: str) -> list[str]:
        """Return what of a cut is not planned."""
        refits = self.config.prune.reconstruct is not Reconstruct.none
        return [f"{stage}: the algebra of the refit, on the host"] * refits + [
            f"{stage}: the refit layer by layer"
        ] * self.config.prune.sequential

    def search(self, teacher: Dims, student: Dims) -> Planned:
        cfg, left_out = self.config.search, self._refit("search")
        if cfg.latency_ms is not None:
            left_out.append("search: the timing of layers for search.latency_ms")
        return Planned("search", self._cut(teacher, student, cfg.top), left_out)

    def prune(self, teacher: Dims, student: Dims, name: str) -> Planned:
        cfg = self.config
        before = self._pass("teacher's loss", passes.teachers_loss, cfg.prune.samples, cfg.evaluate.micro_batch)
        trains = [f"{name}: the training of each layer by itself"] * (cfg.prune.blocks is Blocks.distill)
        return Planned(name, [before, *self._cut(teacher, student)], [*self._refit(name), *trains])

    def rank(self, teacher: Dims, student: Dims) -> Planned:
        """Plan the short distillations, all of the largest student."""
        cfg = self.config.rank
        config = replace(self.config, correct=self.config.correct.at_most(cfg.steps))
        alive, steps, done = cfg.candidates, 0, 0
        for end in cfg.rounds():
            steps += alive * (end - done)
            alive, done = -(-alive // 2), end
        cut = [replace(part, times=part.times * cfg.candidates) for part in self.prune(teacher, student, "rank").parts]
        return Planned("rank", [*cut, self._distilling("train", config, steps)])

    def correct_teacher(self) -> Planned:
        steps = self.config.correct.steps
        return Planned(
            "correct_teacher",
            [self._training("train", trainings.correcting, _in_one_layout(self.config), steps, has_student=False,
                            has_teacher=True)],
        )  # fmt: skip

    def cache_teacher(self) -> Planned:
        cfg, dp = self.config.cache, self.world // self.config.parallel.model_ranks
        shards = -(-self.config.cached_samples // cfg.shard_samples)
        filled = -(-shards // dp) * dp * cfg.shard_samples  # every data-parallel rank runs equally many whole shards
        return Planned("cache_teacher", [self._pass("store", passes.caching, filled, cfg.micro_batch)])

    def _distilling(self, name: str, config: Config, steps: int) -> Part:
        has_teacher = config.distill.teacher is TeacherSource.live
        return self._training(name, trainings.distilling, config, steps, has_student=True, has_teacher=has_teacher)

    def distill(self) -> Planned:
        config, cfg = self.config, self.config.distill
        if not config.correct.while_distilling:
            parts = [self._distilling("train", config, cfg.steps)]
        else:
            parts = [self._distilling("train both", config, min(config.correct.steps, cfg.steps))]
            if rest := cfg.steps - config.correct.steps:
                alone = replace(config, correct=replace(config.correct, while_distilling=False, steps=0))
                parts.append(self._distilling("train", alone, rest))
        if cfg.eval_every is not None:
            windows = cfg.eval_tokens // config.data.sequence_length * max(1, len(config.data.heldout))
            size, times = config.evaluate.micro_batch, cfg.steps // cfg.eval_every
            losses = passes.students_loss
            held_out = self._pass("held out", losses, windows, size, times=times, has_teacher=False, has_student=True)
            parts.append(held_out)
            if cfg.teacher is TeacherSource.live:
                parts.append(self._pass("teacher held out", passes.teachers_loss, windows, size, times=times))
        left_out = []
        if config.model.compile or config.model.compile is None and config.cluster.is_gpu:
            left_out.append("distill: what compiled layers save in activations and time")
        return Planned("distill", parts, left_out)

    def evaluate(self) -> Planned:
        config = self.config
        windows = config.evaluate.tokens // config.data.sequence_length * max(1, len(config.data.heldout))
        part = self._pass("losses", passes.evaluating, windows, config.evaluate.micro_batch, has_student=True)
        left_out = ["evaluate: the tasks, which lm-eval runs on one rank"] * bool(config.evaluate.tasks)
        return Planned("evaluate", [replace(part, tokens=3 * part.tokens)], left_out)


def _in_one_layout(config: Config) -> Config:
    """Return the settings of a part in which the teacher is in the student's layout."""
    return replace(config, distill=replace(config.distill, teacher_tp=None, teacher_pp=None))
