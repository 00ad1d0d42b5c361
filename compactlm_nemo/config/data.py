"""Settings of texts and samples."""

from __future__ import annotations

from collections.abc import Mapping
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


class SpecialTokens(Enum):
    """What a text means that spells a special token: its letters, or the token."""

    literal = "literal"
    parse = "parse"


class Bos(Enum):
    """Whether windows begin with the token that begins a text: as the tokenizer has it, always, or never."""

    tokenizer = "tokenizer"
    always = "always"
    never = "never"


@dataclass(kw_only=True)
class CorpusConfig:
    """One text corpus, tokenised once into Megatron's indexed format."""

    path: Any = None
    """File, folder, glob, `hf://ORG/NAME[/SUBSET][:SPLIT]`, or a list of them: JSON lines, also `.gz`, `.bz2`, `.xz` or
    `.zst`, `.parquet`, whose records have `text`, `messages`, or `prompt` and `completion`; `.txt`, a document a file.
    Or a Megatron prefix, with or without suffix (`PREFIX.bin` and `PREFIX.idx`, with `PREFIX.mask` where not all tokens
    count)."""
    generated: bool = False
    """Instead of a path: the text that the teacher writes (`generate.*`)."""
    key: str = "text"
    """Key, or column, of the text."""
    weight: float = 1.0
    """Share of this corpus in a training blend, relative to the others; 0 leaves it to `score.data`."""
    tokens: int | None = None
    """Instead of a weight: tokens of this corpus in the whole of training, of which every part has its share."""

    loss: LossOn | None = None
    """Tokens of chats and of prompts with completions that count: answer, as null, or all; plain text counts whole."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"data.*.weight={self.weight} must be >= 0; 0 leaves the corpus to score.data.")
        require(
            self.tokens is None or self.tokens > 0,
            f"data.*.tokens={self.tokens} must be > 0; remove the corpus instead.",
        )

    @property
    def share(self) -> float:
        """Its part of a blend, relative to the others."""
        return self.weight if self.tokens is None else float(self.tokens)

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        if self.path is None:
            return []
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def source(self) -> Any:
        """What decides its text: `path`, or "generated"."""
        return "generated" if self.generated else self.path

    @property
    def prefix(self) -> Path | None:
        """The prefix of Megatron token files that `path` is; None of texts."""
        if not isinstance(self.path, str):
            return None
        stem = self.path[: -len(".bin")] if self.path.endswith((".bin", ".idx")) else self.path
        return next((Path(each) for each in (self.path, stem) if Path(each + ".idx").is_file()), None)

    @property
    def is_tokenised(self) -> bool:
        """Whether `path` names Megatron token files."""
        return self.prefix is not None


def corpus_of(key: str, value: Any) -> CorpusConfig:
    """Return a corpus from its short form (a path) or its long one; OmegaConf cannot type values that users add."""
    if isinstance(value, CorpusConfig):
        return value
    given: dict[str, Any]
    given = {"path": value} if isinstance(value, (str, list)) else dict(value) if isinstance(value, Mapping) else {}
    if given.get("generated") is False:
        del given["generated"]
    if "generated" in given and key.startswith("data.train."):
        return _generated(key, value, given)
    unknown = given.keys() - {"path", "key", "weight", "tokens", "loss"}
    path, text_key = given.get("path"), given.get("key", "text")
    is_path = isinstance(path, str) or (isinstance(path, list) and path != [] and all(isinstance(p, str) for p in path))
    require(
        isinstance(text_key, str) and text_key != "", f"{key}.key={text_key} must be a name; leave it out for text."
    )
    if isinstance(loss := given.get("loss"), str):
        require(loss in LossOn.__members__, f"{key}.loss={loss} must be answer or all; leave it out for answer.")
        given["loss"] = LossOn[loss]
    require(
        not unknown and is_path and not {"weight", "tokens"} <= given.keys(),
        f"{key}={value} must be a path or a list of paths, {{path: PATH, weight: NUMBER}} or {{path: PATH, tokens: "
        f"NUMBER}}, with key: NAME and loss: answer or all if you like; for example {key}=text.jsonl.",
    )
    return CorpusConfig(**given)


def _generated(key: str, value: Any, given: dict[str, Any]) -> CorpusConfig:
    """Return a corpus that the teacher writes."""
    is_plain = given.keys() <= {"generated", "weight", "tokens"} and given["generated"] is True
    require(
        is_plain and not {"weight", "tokens"} <= given.keys(),
        f"{key}={value} must have a path or generated: true, and of the teacher's text weight or tokens alone; for "
        f"example {key}.generated=true.",
    )
    return CorpusConfig(**given)


@dataclass(kw_only=True)
class DataConfig:
    train: dict[str, Any] = setting({})
    """Training blend, name to path or list of paths, {path, weight} or {path, tokens}, with `key: NAME` for texts under
    another key than `text`; calibration draws from it as well. {generated: true} is the text that the teacher writes
    (`generate.*`). Of chats the answers count, with `loss: all` every token."""
    heldout: dict[str, Any] = setting({})
    """Evaluation texts, name to path; none of their documents may be in `train`."""
    sequence_length: int = setting(512)
    """Tokens of one sample."""
    chat_template: str | None = setting(None)
    """Jinja file that renders `messages`; null takes the tokenizer's own chat template."""
    special_tokens: SpecialTokens = setting(SpecialTokens.literal)
    """What a plain text that spells a special token, as `<|im_end|>`, becomes: literal, ordinary tokens; parse, that
    token."""
    document_end: str | None = setting(None)
    """Token behind every document; null takes `<|endoftext|>`, `<|end_of_text|>` or the tokenizer's `eos_token`, the
    first that there is."""
    bos: Bos = setting(Bos.tokenizer)
    """Whether the first token of every window is the tokenizer's `bos_token`: tokenizer, where the tokenizer itself
    puts it in front of a text; always; never."""
    mask_documents: bool = setting(False)
    """Attention stays within the documents of a sample; each begins with the end-of-text token before it."""

    def __post_init__(self) -> None:
        for part in ("train", "heldout"):
            setattr(self, part, {name: corpus_of(f"data.{part}.{name}", v) for name, v in getattr(self, part).items()})
        require(self.sequence_length > 1, f"data.sequence_length={self.sequence_length} must be > 1; try 512.")

    @property
    def has_generated(self) -> bool:
        """Whether a training corpus is text of the teacher."""
        return any(corpus.generated for corpus in self.train.values())

    @property
    def blend(self) -> dict[str, CorpusConfig]:
        """The corpora of the training blend: those that training draws from."""
        return {name: corpus for name, corpus in self.train.items() if corpus.share > 0}

    def corpora(self) -> dict[str, CorpusConfig]:
        """Return every corpus under a name of its own: `train.NAME` and `heldout.NAME`, which may share NAME."""
        parts = {"train": self.train, "heldout": self.heldout}
        return {f"{part}.{name}": corpus for part, held in parts.items() for name, corpus in held.items()}
