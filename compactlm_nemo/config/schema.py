"""Every setting of every command, with its meaning, unit and default.

One schema serves all verbs, so that one experiment file describes a whole run and `compress` passes it on unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from compactlm_nemo.config.cluster import ClusterConfig
from compactlm_nemo.config.data import DataConfig
from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.config.evaluate import EvaluateConfig
from compactlm_nemo.config.export import ExportConfig
from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.config.gate import GateConfig
from compactlm_nemo.config.generate import GenerateConfig
from compactlm_nemo.config.loss import CROSS_ENTROPY, HiddenConfig
from compactlm_nemo.config.model import ModelConfig
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.config.plan import PlanConfig
from compactlm_nemo.config.profile import ProfileConfig
from compactlm_nemo.config.prune import PruneConfig
from compactlm_nemo.config.run import RunConfig, WandbConfig
from compactlm_nemo.config.score import ScoreConfig
from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.config.teacher import CacheConfig, CorrectConfig, TeacherSource
from compactlm_nemo.config.workflow import RankConfig, RoundsConfig
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class Config:
    """The whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    correct: CorrectConfig = field(default_factory=CorrectConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster that the run is meant for; cluster=NAME takes conf/cluster/NAME.yaml."""
    nodes: int = setting(1, changes_result=False)
    """Nodes that the run is meant for: `recipes.plan` plans for them, `recipes.submit` asks Slurm for them."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    dry_run: bool = False
    """Check everything, print the resolved configuration and the plan, and exit 0."""

    def __post_init__(self) -> None:
        require(self.nodes > 0, f"nodes={self.nodes} must be > 0; give the nodes that the run gets.")

    @property
    def meant_ranks(self) -> int:
        """Ranks of the nodes and the cluster that the run is meant for."""
        return self.nodes * self.cluster.devices_per_node

    @property
    def calibration_shares(self) -> dict[str, float]:
        """Share of every text that calibration draws from; those of the training blend come first, with 0 too.

        So a text of the blend has the same number in both, and the windows of both are in one order.
        """
        if not self.score.data:
            return {name: corpus.share for name, corpus in self.data.blend.items()}
        further = [name for name in self.data.train if name in self.score.data and name not in self.data.blend]
        return {name: float(self.score.data.get(name, 0)) for name in [*self.data.blend, *further]}

    @property
    def teacher_parallel(self) -> ParallelConfig:
        """Layout of a live teacher while it distils."""
        tp, pp = self.distill.teacher_tp or self.parallel.tp, self.distill.teacher_pp or self.parallel.pp
        if (tp, pp) == (self.parallel.tp, self.parallel.pp):
            return self.parallel
        return ParallelConfig(
            tp=tp, pp=pp, cp=self.parallel.cp, sequence_parallel=self.parallel.sequence_parallel and tp > 1
        )

    @property
    def corrects_before(self) -> bool:
        """Whether the correct_teacher stage makes the teacher that teaches."""
        return self.correct.steps > 0 and not self.correct.while_distilling

    @property
    def correction(self) -> DistillConfig:
        """How the teacher itself is trained: `correct`, the rest as in `distill`, without a teacher of its own."""
        cfg = self.correct
        require(cfg.steps > 0, "correct.steps=0 trains no teacher; set it, for example correct.steps=200.")
        return replace(
            self.distill,
            steps=cfg.steps,
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            warmup_steps=min(cfg.warmup_steps, cfg.steps // 2),
            teacher=TeacherSource.none,
            loss=CROSS_ENTROPY,
            hidden=HiddenConfig(),
            stop_after=None,
            start_from=None,
            teacher_tp=None,
            teacher_pp=None,
        )

    @property
    def cached_samples(self) -> int:
        """Samples of the training order that the cache_teacher stage stores."""
        return self.cache.samples or self.distill.num_samples
