"""Settings of texts and samples."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class LossOn(Enum):
    """Which tokens of a corpus of chats count: those of the answers, or all."""

    answer = "answer"
    all = "all"


@dataclass(kw_only=True)
class CorpusConfig:
    """One text corpus, tokenised once into Megatron's indexed format."""

    path: str
    """JSON-lines file whose lines have `text`, `messages`, or `prompt` and `completion`; or a Megatron prefix
    (`PREFIX.bin` and `PREFIX.idx`, with `PREFIX.mask` where not all tokens count)."""
    weight: float = 1.0
    """Share of this corpus in a training blend, relative to the others."""
    tokens: int | None = None
    """Instead of a weight: tokens of this corpus in the whole of training, of which every part has its share."""

    loss: LossOn | None = None
    """Tokens of chats and of prompts with completions that count: answer, as null, or all; plain text counts whole."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data.*.weight={self.weight} must be > 0; remove the corpus instead.")
        require(
            self.tokens is None or self.tokens > 0,
            f"data.*.tokens={self.tokens} must be > 0; remove the corpus instead.",
        )

    @property
    def share(self) -> float:
        """Its part of a blend, relative to the others."""
        return self.weight if self.tokens is None else float(self.tokens)

    @property
    def is_tokenised(self) -> bool:
        """Whether `path` is the prefix of Megatron token files."""
        return Path(self.path + ".idx").is_file()


def _corpus(key: str, value: Any) -> CorpusConfig:
    """Return a corpus from its short form (a path) or its long one; OmegaConf cannot type values that users add."""
    if isinstance(value, CorpusConfig):
        return value
    given = {"path": value} if isinstance(value, str) else dict(value or {})
    unknown = given.keys() - {"path", "weight", "tokens", "loss"}
    if isinstance(loss := given.get("loss"), str):
        require(loss in LossOn.__members__, f"{key}.loss={loss} must be answer or all; leave it out for answer.")
        given["loss"] = LossOn[loss]
    require(
        not unknown and isinstance(given.get("path"), str) and not {"weight", "tokens"} <= given.keys(),
        f"{key}={value} must be a path, {{path: PATH, weight: NUMBER}} or {{path: PATH, tokens: NUMBER}}, with "
        f"loss: answer or all if you like; for example {key}=text.jsonl.",
    )
    return CorpusConfig(**given)


@dataclass(kw_only=True)
class DataConfig:
    train: dict[str, Any] = setting({})
    """Training blend, name to path, {path, weight} or {path, tokens}; calibration draws from it as well. Of chats the
    answers count, with `loss: all` every token."""
    heldout: dict[str, Any] = setting({})
    """Evaluation texts, name to path; none of their documents may be in `train`."""
    sequence_length: int = setting(512)
    """Tokens of one sample."""
    chat_template: str | None = setting(None)
    """Jinja file that renders `messages`; null takes the tokenizer's own chat template."""
    mask_documents: bool = setting(False)
    """Attention stays within the documents of a sample; each begins with the end-of-text token before it."""

    def __post_init__(self) -> None:
        for part in ("train", "heldout"):
            setattr(self, part, {name: _corpus(f"data.{part}.{name}", v) for name, v in getattr(self, part).items()})
        require(self.sequence_length > 1, f"data.sequence_length={self.sequence_length} must be > 1; try 512.")

    def corpora(self) -> dict[str, CorpusConfig]:
        """Return every corpus under a name of its own: `train.NAME` and `heldout.NAME`, which may share NAME."""
        parts = {"train": self.train, "heldout": self.heldout}
        return {f"{part}.{name}": corpus for part, held in parts.items() for name, corpus in held.items()}
