"""Settings of the teacher: where it is, what it must be, and its number format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from compactlm_nemo.config.data import corpus_of
from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.config.hardware import has_cuda
from compactlm_nemo.errors import require

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""ORG/NAME of the Hugging Face Hub."""


def is_repository(source: str) -> bool:
    """Whether a model is a repository of the Hub: its name is ORG/NAME, and nothing here has that path."""
    return bool(REPOSITORY.fullmatch(source)) and not source.endswith(".gguf") and not Path(source).exists()


class Precision(Enum):
    """Number format of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    auto = "auto"


def device_precision() -> Precision:
    """Return what `auto` means on this machine: bf16 where a run uses CUDA, fp32 where it uses the CPU."""
    return Precision.bf16 if has_cuda() else Precision.fp32


@dataclass(kw_only=True)
class ModelConfig:
    source: str = setting(MISSING, changes_result=False)
    """Teacher: a repository of the Hugging Face Hub as ORG/NAME (a folder of that name wins), a Hugging Face folder
    (safetensors), a `.gguf` file, a checkpoint of NeMo 2 or Megatron-Bridge, or a `torch_dist` folder of Megatron-Core
    (then `model.hf_assets` is needed)."""
    revision: str | None = setting(None, changes_result=False)
    """Branch, tag or commit of a repository of the Hub; null is its main branch. A run keeps the commit that it began
    with (`run.dir/hub.json`), which decides its result."""
    hf_assets: str | None = setting(None, changes_result=False)
    """Folder with `config.json` and tokenizer of a teacher that is a `torch_dist` folder, where that has none of its
    own. What both say must agree."""
    architecture: dict[str, Any] = setting({}, changes_result=False)
    """Hugging Face config values the source must have; a dry run plans with them where the source is absent."""
    precision: Precision = setting(Precision.auto)
    """Weights and activations; bf16 trains with fp32 main weights. auto is bf16 where this machine has a CUDA device,
    else fp32; it is replaced by either at once, so results and plans name what was taken. Give it to plan a run for
    another machine, or to spread the stages of a run over machines of both kinds."""
    compile: bool | None = setting(None, changes_result=False)
    """Compile the layers of student and live teacher for training, which fuses what stands between their matrix
    products and takes a minute or so at the first step. null compiles on CUDA where a C compiler is found, unless a
    `distill.hidden` loss hooks into the layers. Scoring and cutting never compile."""
    vocab_multiple: int = setting(128, changes_result=False)
    """The vocabulary is padded to a multiple of this times `parallel.tp`; exported without padding."""

    vocab_texts: Any = setting(None)
    """Trim the vocabulary to the tokens that these texts use: a path or a list of paths as in `data.train`, or
    {path, key}; null keeps it whole. Table, head, tokenizer, losses and export have these tokens alone; a corpus that
    needs another one is refused, so give every text of the run."""

    def __post_init__(self) -> None:
        if self.vocab_texts is not None:
            self.vocab_texts = corpus_of("model.vocab_texts", self.vocab_texts)
        if self.precision is Precision.auto:
            self.precision = device_precision()
        require(self.vocab_multiple > 0, f"model.vocab_multiple={self.vocab_multiple} must be > 0; use 128.")
