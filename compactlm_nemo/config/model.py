"""Settings of the teacher: where it is, what it must be, and its number format."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class Precision(Enum):
    """Number format of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True)
class ModelConfig:
    source: str = setting(MISSING, changes_result=False)
    """Teacher: a Hugging Face folder (safetensors), a `.gguf` file, or a NeMo 2, Megatron-Bridge or Megatron-Core
    `torch_dist` folder (then `model.hf_assets` is needed)."""
    hf_assets: str | None = setting(None, changes_result=False)
    """Folder with `config.json` and tokenizer of a teacher that is a `torch_dist` folder."""
    architecture: dict[str, Any] = setting({}, changes_result=False)
    """Hugging Face config values the source must have; a dry run plans with them where the source is absent."""
    precision: Precision = setting(Precision.fp32)
    """Weights and activations; bf16 trains with fp32 main weights."""
    vocab_multiple: int = setting(128, changes_result=False)
    """The vocabulary is padded to a multiple of this times `parallel.tp`; exported without padding."""

    def __post_init__(self) -> None:
        require(self.vocab_multiple > 0, f"model.vocab_multiple={self.vocab_multiple} must be > 0; use 128.")
