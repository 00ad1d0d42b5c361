"""Every setting of every command, with its meaning, unit and default.

One schema serves all verbs, so that one experiment file describes a whole run and `compress` passes it on unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from compactlm_nemo.errors import ConfigError


class Precision(Enum):
    """Number format of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


class Aggregator(Enum):
    """How values over a dimension become one number: mean(|x|), sqrt(sum x^2) or variance."""

    mean = "mean"
    l2 = "l2"
    var = "var"


class WandbMode(Enum):
    """Where W&B metrics go; `auto` is online with a login in the environment and disabled without."""

    auto = "auto"
    disabled = "disabled"
    offline = "offline"
    online = "online"


SPEED_ONLY = {"micro_batch", "chunk_tokens", "checkpoint_every", "keep_checkpoints", "log_every"}
"""Settings that change memory, speed or output, not the result; they may differ when a run goes on."""


def deciding(section: Any) -> dict[str, Any]:
    """The settings of a section that decide its result."""
    return {name: value for name, value in vars(section).items() if name not in SPEED_ONLY}


def require(holds: bool, message: str) -> None:
    """Raise ConfigError(message) unless the rule holds."""
    if not holds:
        raise ConfigError(message)


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
    pp: int = 1
    """Pipeline stages; must divide the number of layers of teacher and student."""

    def __post_init__(self) -> None:
        require(self.tp > 0, f"parallel.tp={self.tp} must be > 0; use 1 for no tensor parallelism.")
        require(self.pp > 0, f"parallel.pp={self.pp} must be > 0; use 1 for no pipeline.")


@dataclass(kw_only=True)
class CorpusConfig:
    """One text corpus, tokenised once into Megatron's indexed format."""

    path: str = MISSING
    """JSON-lines file with a `text` field, or a Megatron prefix (`PREFIX.bin` and `PREFIX.idx`)."""
    weight: float = 1.0
    """Share of this corpus in a training blend, relative to the others."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data.*.weight={self.weight} must be > 0; remove the corpus instead.")

    @property
    def is_tokenised(self) -> bool:
        """Whether `path` is the prefix of Megatron token files."""
        return Path(self.path + ".idx").is_file()


def _corpus(key: str, value: Any) -> CorpusConfig:
    """A corpus from its short form (a path) or its long one. OmegaConf cannot type dict values that users add."""
    if isinstance(value, CorpusConfig):
        return value
    given = {"path": value} if isinstance(value, str) else dict(value or {})
    unknown = given.keys() - {"path", "weight"}
    require(
        not unknown and isinstance(given.get("path"), str),
        f"{key}={value} must be a path or {{path: PATH, weight: NUMBER}}; for example {key}=text.jsonl.",
    )
    return CorpusConfig(**given)


@dataclass(kw_only=True)
class DataConfig:
    train: dict[str, Any] = field(default_factory=dict)
    """Training blend, name to path or to {path, weight}; calibration windows are drawn from it as well."""
    heldout: dict[str, Any] = field(default_factory=dict)
    """Evaluation texts, name to path; none of their documents may be in `train`."""
    sequence_length: int = 512
    """Tokens of one sample."""

    def __post_init__(self) -> None:
        for part in ("train", "heldout"):
            setattr(self, part, {name: _corpus(f"data.{part}.{name}", v) for name, v in getattr(self, part).items()})
        require(self.sequence_length > 1, f"data.sequence_length={self.sequence_length} must be > 1; try 512.")

    def corpora(self) -> dict[str, CorpusConfig]:
        """Every corpus under a name of its own: `train.NAME` and `heldout.NAME`, which may share NAME."""
        parts = {"train": self.train, "heldout": self.heldout}
        return {f"{part}.{name}": corpus for part, held in parts.items() for name, corpus in held.items()}


@dataclass(kw_only=True)
class ScoreConfig:
    samples: int = 1024
    """Calibration samples of `data.sequence_length` tokens (the paper: 1024)."""
    micro_batch: int = 4
    """Samples per forward pass on one rank."""
    batch_aggregator: Aggregator = Aggregator.l2
    """Over samples; the paper's best pair is (l2, mean)."""
    sequence_aggregator: Aggregator = Aggregator.mean
    """Over the tokens of one sample, applied first."""

    def __post_init__(self) -> None:
        require(self.samples > 0, f"score.samples={self.samples} must be > 0; the paper uses 1024.")
        require(self.micro_batch > 0, f"score.micro_batch={self.micro_batch} must be > 0.")


@dataclass(kw_only=True)
class SearchConfig:
    """Space and budget. An empty axis keeps the teacher's value."""

    layers: list[int] = field(default_factory=list)
    """Numbers of layers to try."""
    heads: list[int] = field(default_factory=list)
    """Numbers of query heads to try; each must be a multiple of the query groups."""
    ffn: list[int] = field(default_factory=list)
    """MLP widths to try."""
    hidden: list[int] = field(default_factory=list)
    """Hidden sizes to try."""
    ffn_multiples: list[float] = field(default_factory=list)
    """MLP widths as multiples of the hidden size; excludes `search.ffn`."""
    params: float | None = None
    """Target parameter count; null takes every candidate in the space."""
    band: float = 0.05
    """Accepted relative distance from `search.params`."""

    def __post_init__(self) -> None:
        require(
            not (self.ffn and self.ffn_multiples),
            "search.ffn and search.ffn_multiples are both set; give one of them.",
        )
        require(0 <= self.band < 1, f"search.band={self.band} must be in [0, 1); the paper uses 0.05.")


@dataclass(kw_only=True)
class PruneConfig:
    candidate: int = 0
    """Index into candidates.json, best first."""


@dataclass(kw_only=True)
class DistillConfig:
    steps: int = 1000
    """Optimizer steps."""
    global_batch: int = 8
    """Samples of one step over all data-parallel ranks."""
    micro_batch: int = 1
    """Samples of one forward/backward on one rank."""
    temperature: float = 1.0
    """Softmax temperature of teacher and student, > 0; the loss is scaled by its square."""
    chunk_tokens: int = 512
    """Tokens whose logits exist at the same time."""
    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 4.5e-7
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    beta1: float = 0.9
    """Adam."""
    beta2: float = 0.95
    """Adam."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_every: int = 1
    """Steps between metric lines."""

    def __post_init__(self) -> None:
        require(self.steps > 0, f"distill.steps={self.steps} must be > 0.")
        require(self.temperature > 0, f"distill.temperature={self.temperature} must be > 0; 1.0 is plain KL.")
        for name in (
            "global_batch",
            "micro_batch",
            "chunk_tokens",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            require(getattr(self, name) > 0, f"distill.{name}={getattr(self, name)} must be > 0.")
        require(self.weight_decay >= 0, f"distill.weight_decay={self.weight_decay} must be >= 0; 0 is off.")
        require(self.clip_grad >= 0, f"distill.clip_grad={self.clip_grad} must be >= 0; 0 is off.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"distill.{name}={getattr(self, name)} must be in [0, 1); try 0.9.")
        require(self.lr > 0, f"distill.lr={self.lr} must be > 0; the paper uses 2e-4.")
        require(
            0 <= self.min_lr <= self.lr,
            f"distill.min_lr={self.min_lr} must be in [0, distill.lr={self.lr}]; lower it.",
        )
        require(
            0 <= self.warmup_steps < self.steps,
            f"distill.warmup_steps={self.warmup_steps} must be in [0, distill.steps={self.steps}); lower it.",
        )


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
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    dry_run: bool = False
    """Check everything, print the resolved configuration and the plan, and exit 0."""
