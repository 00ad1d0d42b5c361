"""Settings of the measurement of speed and memory where the exported student will be served."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from compactlm_nemo.config.export import ExportDtype
from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class Engine(Enum):
    """What loads a model and generates."""

    transformers = "transformers"
    vllm = "vllm"
    llama_cpp = "llama_cpp"


class Phase(Enum):
    """A part of an answer: the whole prompt at once, up to the first token; or the steps after it, a token each."""

    prefill = "prefill"
    decode = "decode"


@dataclass(kw_only=True)
class ProfileConfig:
    engines: list[Engine] = setting([])
    """Engines that generate: transformers; vllm and llama_cpp where they are installed. Empty leaves the stage out of
    a whole run; `recipes.profile` by itself takes transformers then."""
    text: str | None = setting(None)
    """Held-out text of `data.heldout` that the prompts are cut from; null takes the first."""
    prompt_tokens: int = setting(128)
    """Tokens of a prompt."""
    prompts: int = setting(32)
    """Different prompts, at least the largest batch; repeats go on with the next ones."""
    new_tokens: int = setting(32)
    """Tokens that are generated after each prompt, neither fewer nor more."""
    batches: list[int] = setting([1, 8, 32])
    """Numbers of prompts that are answered at once."""
    repeats: int = setting(5)
    """Timed generations of each model at each batch, after one that is not; teacher and student take turns."""
    threads: int | None = setting(None)
    """Threads of the CPU that an engine may use; null takes every core that this process may run on."""
    dtype: ExportDtype | None = setting(None)
    """Number format that both models are loaded in; null takes that of the exported weights."""
    llama_cpp: str | None = setting(None)
    """Path of llama.cpp's `llama-batched-bench`; null takes the one on PATH."""
    converter: str | None = setting(None)
    """Path of llama.cpp's `convert_hf_to_gguf.py`; null takes the one on PATH."""

    def __post_init__(self) -> None:
        names = [engine.name for engine in self.engines]
        require(len({*names}) == len(names), f"profile.engines={names} names one twice; name each once.")
        require(self.prompt_tokens > 0, f"profile.prompt_tokens={self.prompt_tokens} must be > 0; use 128.")
        require(
            self.new_tokens > 1,
            f"profile.new_tokens={self.new_tokens} must be > 1: steps after the first token are timed; use 32.",
        )
        require(self.repeats > 0, f"profile.repeats={self.repeats} must be > 0; use 5.")
        require(
            self.threads is None or self.threads > 0,
            f"profile.threads={self.threads} must be > 0; null takes all cores.",
        )
        require(
            len(self.batches) > 0 and all(batch > 0 for batch in self.batches),
            f"profile.batches={self.batches} must be numbers > 0; use [1,8,32].",
        )
        require(
            len({*self.batches}) == len(self.batches),
            f"profile.batches={self.batches} names one twice; name each once.",
        )
        require(
            self.prompts >= max(self.batches),
            f"profile.prompts={self.prompts} must be at least the largest of profile.batches={self.batches}; raise it.",
        )
        for name in ("llama_cpp", "converter"):
            value = getattr(self, name)
            require(
                value is None or Engine.llama_cpp in self.engines,
                f"profile.{name}={value} is read by the engine llama_cpp alone; add it to profile.engines, or leave "
                "the path out.",
            )
