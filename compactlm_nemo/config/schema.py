"""Every setting of every command, with its meaning, unit and default.

One schema serves all verbs, so that one experiment file describes a whole run and `compress` passes it on unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from compactlm_nemo.config.choices import (
    DepthMetric,
    ErrorAxis,
    HeadCut,
    Neurons,
    Precision,
    Reconstruct,
    Stream,
    TeacherSource,
    WandbMode,
    WidthMetric,
)
from compactlm_nemo.config.data import DataConfig
from compactlm_nemo.config.distill import CROSS_ENTROPY, CacheConfig, CorrectConfig, DistillConfig, deciding
from compactlm_nemo.config.hidden import HiddenConfig
from compactlm_nemo.config.search import RankConfig, SearchConfig
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class RunConfig:
    dir: str = MISSING
    """Folder of this run; each stage writes its artifact into a subfolder."""
    seed: int = 1234
    """Seed of calibration windows and data order."""


@dataclass(kw_only=True)
class ModelConfig:
    source: str = MISSING
    """Teacher: a Hugging Face folder (safetensors), a `.gguf` file, or a NeMo 2, Megatron-Bridge or Megatron-Core
    `torch_dist` folder (then `model.companions` is needed)."""
    companions: str | None = None
    """Folder with `config.json` and tokenizer of a teacher that is a `torch_dist` folder."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Hugging Face config values the source must have; a dry run plans with them where the source is absent."""
    precision: Precision = Precision.fp32
    """Weights and activations; bf16 trains with fp32 main weights."""
    vocab_multiple: int = 128
    """The vocabulary is padded to a multiple of this times `parallel.tp`; exported without padding."""

    def __post_init__(self) -> None:
        require(self.vocab_multiple > 0, f"model.vocab_multiple={self.vocab_multiple} must be > 0; use 128.")


@dataclass(kw_only=True)
class ParallelConfig:
    tp: int = 1
    """Tensor-parallel ranks; must divide heads, query groups and MLP width of teacher and student."""
    sequence_parallel: bool = False
    """Split norms and residual stream along the sequence over the tensor-parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    virtual_stages: int = 1
    """Model chunks of each pipeline rank; more than 1 interleaves them and needs `parallel.pp` > 1."""
    pp_split: list[int] = field(default_factory=list)
    """Layers of each chunk in pipeline order, as proportions ([1, 3] cuts 8 layers into 2 and 6); empty is equal."""
    cp: int = 1
    """Context-parallel ranks: each holds a part of every sequence."""
    ep: int = 1
    """Expert-parallel ranks; they are data-parallel ranks outside the expert layers."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "virtual_stages", "cp", "ep"):
            require(getattr(self, name) > 0, f"parallel.{name}={getattr(self, name)} must be > 0; 1 turns it off.")
        require(
            not self.sequence_parallel or self.tp > 1,
            "parallel.sequence_parallel=true needs parallel.tp > 1; raise tp or set it to false.",
        )
        require(
            self.virtual_stages == 1 or self.pp > 1,
            f"parallel.virtual_stages={self.virtual_stages} needs parallel.pp > 1; raise pp or set it to 1.",
        )
        require(
            len(self.pp_split) in (0, self.num_chunks) and all(part > 0 for part in self.pp_split),
            f"parallel.pp_split={self.pp_split} must be {self.num_chunks} numbers > 0, one for each of pp x "
            "virtual_stages chunks; leave it empty for equal parts.",
        )

    @property
    def num_chunks(self) -> int:
        """Pieces the layers are cut into."""
        return self.pp * self.virtual_stages

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model and work on one batch."""
        return self.tp * self.pp * self.cp


@dataclass(kw_only=True)
class ScoreConfig:
    samples: int = 1024
    """Calibration samples of `data.sequence_length` tokens (the paper: 1024)."""
    micro_batch: int = 4
    """Samples per forward pass on one rank."""
    width: list[WidthMetric] = field(default_factory=lambda: [WidthMetric.l2_mean])
    """Metrics of heads, groups, neurons, channels and experts, all from one pass; the paper's best is l2_mean."""
    depth: list[DepthMetric] = field(default_factory=lambda: [DepthMetric.bi])
    """Metrics of layers."""
    neurons: Neurons = Neurons.after
    """Neurons before or after the activation; the paper's formula is before, its peers measure after."""
    depth_samples: int | None = None
    """Samples of the metrics that leave layers out (they cost about layers / 2 passes); null takes all."""
    iterations: int = 1
    """Layers that logit_mse_iterative removes one after another."""
    task_block: int = 1
    """Layers in a block that `tasks` leaves out; the second paper removes one contiguous block."""
    block_lengths: list[int] = field(default_factory=list)
    """Layers in the blocks that `lm_loss_blocks` leaves out, one walk for each length."""
    second_moments: bool = False
    """Keep the input covariance of output projections and fc2 and of each norm's output, for reconstruction."""
    expert_moments: bool = False
    """With `score.second_moments` also those of every routed expert's fc2: experts x width^2 numbers a layer."""
    start_from: str | None = None
    """Folder of a finished score stage on the same texts and seed whose samples count as measured: with a larger
    `score.samples` only the further ones are run. Activation metrics only."""
    save_every: int = 256
    """Samples after which progress is kept; a killed run goes on from there."""
    stop_tolerance: float | None = None
    """Stop early when no axis has moved by more than this (1 - Kendall's tau) between two saves; null never stops."""
    stop_checks: int = 3
    """Saves in a row that must be within `score.stop_tolerance`."""

    def __post_init__(self) -> None:
        require(self.samples > 0, f"score.samples={self.samples} must be > 0; the paper uses 1024.")
        for name in ("micro_batch", "iterations", "task_block", "save_every", "stop_checks"):
            require(getattr(self, name) > 0, f"score.{name}={getattr(self, name)} must be > 0.")
        require(
            self.depth_samples is None or 0 < self.depth_samples <= self.samples,
            f"score.depth_samples={self.depth_samples} must be in [1, score.samples={self.samples}]; null takes all.",
        )
        require(
            self.stop_tolerance is None or 0 <= self.stop_tolerance < 1,
            f"score.stop_tolerance={self.stop_tolerance} must be in [0, 1); try 0.01.",
        )
        require(
            (DepthMetric.lm_loss_blocks in self.depth) == bool(self.block_lengths),
            f"score.depth=[lm_loss_blocks] and score.block_lengths={self.block_lengths} need each other; set both.",
        )
        require(
            self.second_moments or not self.expert_moments,
            "score.expert_moments=true needs score.second_moments=true; set both.",
        )
        for name in ("width", "depth"):
            given = getattr(self, name)
            require(len(given) > 0, f"score.{name} is empty; name at least one metric.")
            require(len(set(given)) == len(given), f"score.{name} names a metric twice; name each once.")


@dataclass(kw_only=True)
class PruneConfig:
    candidate: int = 0
    """Index into candidates.json, best first; after `recipes.rank` into ranking.json."""
    heads: HeadCut = HeadCut.cut
    """cut, or merge: removed query heads are folded into kept ones of their group, as in the paper."""
    reconstruct: Reconstruct = Reconstruct.none
    """least_squares: maps that lose inputs are refitted on calibration data (needs `score.second_moments`)."""
    sequential: bool = False
    """Refit once more, layer by layer, on what the pruned layers before produce (needs least_squares)."""
    ridge: float = 1e-3
    """Ridge of the refit as a share of the mean second moment; more trusts the calibration text less."""
    hidden: Stream = Stream.select
    """select, or rotate to principal directions first (needs least_squares and an RMSNorm model)."""
    by_error: list[ErrorAxis] = field(default_factory=list)
    """Axes whose units are chosen by the error that is left after refitting, not by their scores (needs
    least_squares)."""
    samples: int = 16
    """Windows of the training text, apart from the calibration samples, for the zero-shot losses before and after."""

    def __post_init__(self) -> None:
        require(self.ridge > 0, f"prune.ridge={self.ridge} must be > 0; 0.001 is a good start.")
        require(self.samples > 0, f"prune.samples={self.samples} must be > 0; try 16.")
        if self.reconstruct is Reconstruct.none:
            for name, used in (
                ("hidden=rotate", self.hidden is Stream.rotate),
                ("by_error", bool(self.by_error)),
                ("sequential", self.sequential),
            ):
                require(not used, f"prune.{name} needs prune.reconstruct=least_squares; set it, or leave it out.")
        require(
            self.heads is HeadCut.cut or self.reconstruct is Reconstruct.none,
            "prune.heads=merge changes what the refit was measured on; set prune.reconstruct=none, or heads=cut.",
        )


@dataclass(kw_only=True)
class RoundsConfig:
    """Iterative pruning (`recipes.rounds`)."""

    count: int = 2
    """Rounds of score and prune; 1 is what recipes.compress does."""
    steps: int = 0
    """Optimizer steps of distillation after each round but the last, which trains `distill.steps`; 0 is none."""

    def __post_init__(self) -> None:
        require(self.count > 0, f"rounds.count={self.count} must be > 0; 1 prunes at once.")
        require(self.steps >= 0, f"rounds.steps={self.steps} must be >= 0; 0 trains only after the last round.")


@dataclass(kw_only=True)
class EvaluateConfig:
    tokens: int = 16384
    """Held-out tokens per text (whole windows; fewer when the text is shorter)."""
    micro_batch: int = 4
    """Samples per forward pass on one rank."""

    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks, run on teacher, pruned and distilled model as exported (needs the `eval` extra)."""
    task_folder: str | None = None
    """Folder with further lm-eval task files."""
    task_limit: int | None = None
    """Samples of each task; null takes all."""

    def __post_init__(self) -> None:
        require(self.tokens > 0, f"evaluate.tokens={self.tokens} must be > 0.")
        require(self.micro_batch > 0, f"evaluate.micro_batch={self.micro_batch} must be > 0.")


@dataclass(kw_only=True)
class WandbConfig:
    mode: WandbMode = WandbMode.auto
    """auto, disabled, offline or online."""
    project: str = "compactlm"
    """W&B project."""
    name: str | None = None
    """Run name; null takes the name of `run.dir`."""


@dataclass(kw_only=True)
class Config:
    """The whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    correct: CorrectConfig = field(default_factory=CorrectConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    dry_run: bool = False
    """Check everything, print the resolved configuration and the plan, and exit 0."""

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
    def samples_settings(self) -> dict[str, Any]:
        """What decides, of given texts, what a sample holds and sees."""
        return {
            "data.sequence_length": self.data.sequence_length,
            "data.mask_documents": self.data.mask_documents,
            "run.seed": self.run.seed,
        }

    @property
    def training_text(self) -> dict[str, Any]:
        """What decides which tokens a sample of the training blend holds, and what they see of each other."""
        total = sum(corpus.share for corpus in self.data.train.values())
        blend = {name: [corpus.path, corpus.share / total] for name, corpus in self.data.train.items()}
        return self.samples_settings | {"data.train": blend}

    @property
    def corrects_before(self) -> bool:
        """Whether the correct_teacher stage makes the teacher that teaches."""
        return self.correct.steps > 0 and not self.correct.beside

    @property
    def correcting(self) -> dict[str, Any]:
        """What decides how the teacher is trained while it teaches, where it is."""
        return {"correct": deciding(self.correction)} if self.correct.beside else {}

    @property
    def correction(self) -> DistillConfig:
        """How the teacher itself is trained: `correct`, the rest as in `distill`, without a teacher of its own."""
        own = self.correct
        require(own.steps > 0, "correct.steps=0 trains no teacher; set it, for example correct.steps=200.")
        return replace(
            self.distill,
            steps=own.steps,
            lr=own.lr,
            min_lr=own.min_lr,
            warmup_steps=min(own.warmup_steps, own.steps // 2),
            teacher=TeacherSource.none,
            loss=CROSS_ENTROPY,
            hidden=HiddenConfig(),
            stop_after=None,
            teacher_tp=None,
            teacher_pp=None,
        )

    @property
    def cached_samples(self) -> int:
        """Samples of the training order that the cache_teacher stage stores."""
        return self.cache.samples or self.distill.num_samples


@dataclass(kw_only=True)
class CompareConfig:
    """Settings of `recipes.compare_scores`, which reads finished scores and belongs to no run."""

    a: str = MISSING
    """Scores file, or the folder of a score stage."""
    b: str = MISSING
    """Scores of the same model to compare with; may be the same file."""
    width_a: WidthMetric | None = None
    """Width metric of `a` to compare with `width_b` of `b`, and nothing else; null compares all metrics in both."""
    width_b: WidthMetric | None = None
    """Width metric of `b` to compare with `width_a` of `a`; set both or none."""
    dry_run: bool = False
    """Check that both files can be compared, print the resolved configuration, and exit 0."""

    def __post_init__(self) -> None:
        given, other = ("width_a", "width_b") if self.width_a else ("width_b", "width_a")
        require(
            (self.width_a is None) == (self.width_b is None),
            f"{given} is set and {other} is not; name one metric of each file, or leave both out.",
        )
