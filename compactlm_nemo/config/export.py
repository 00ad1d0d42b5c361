"""Settings of the folder that a model leaves as."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.config.model import REPOSITORY
from compactlm_nemo.errors import require


class ExportedModel(Enum):
    """Which model of a run leaves."""

    teacher = "teacher"
    student = "student"
    distilled = "distilled"


class ExportFormat(Enum):
    """Whose folder a model leaves as."""

    hf = "hf"
    bridge = "bridge"
    nemo2 = "nemo2"


class ExportDtype(Enum):
    """Number format of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass(kw_only=True)
class ExportConfig:
    of: ExportedModel = setting(ExportedModel.distilled)
    """The teacher as imported, the student as cut and not trained yet (to train it elsewhere), or the distilled one."""
    format: ExportFormat = setting(ExportFormat.hf)
    """hf is a Hugging Face folder, `export/hf`; bridge a checkpoint of Megatron-Bridge, `export/bridge`, for
    `AutoBridge.export_ckpt` and the trainer's `pretrained_checkpoint`; nemo2 one of NeMo 2, `export/nemo2`, for
    `llm.finetune`, `llm.deploy` and `llm.export_ckpt`."""
    dtype: ExportDtype | None = setting(None)
    """Number format of the weights; null takes that of the teacher's config.json, or `model.precision` where it has
    none of these."""
    shard_gib: float = setting(4.0)
    """A file of weights is closed before it would be larger than these GiB. A checkpoint of Megatron-Bridge or
    NeMo 2 is one file; the files that Bridge makes of it are cut so."""

    verify: str | None = setting(None)
    """Python of an environment with the tool that will read the folder: transformers of any version for hf,
    Megatron-Bridge, or NeMo 2. It loads the folder, and every weight that it then has is compared with the exported
    one before the export counts as done. The model must fit into the memory of the machine."""

    push: str | None = setting(None)
    """Repository of the Hugging Face Hub, as ORG/NAME, that the push stage uploads the folder to; it is made private
    where there is none. Needs a token: HF_TOKEN, or `hf auth login`. null keeps the folder here."""

    def __post_init__(self) -> None:
        require(self.shard_gib > 0, f"export.shard_gib={self.shard_gib} must be > 0; use 4.")
        require(
            self.push is None or REPOSITORY.fullmatch(self.push) is not None,
            f"export.push={self.push} must be ORG/NAME of letters, digits and . _ -; or leave it out.",
        )
        require(
            self.push is None or self.format is ExportFormat.hf,
            f"export.push={self.push} needs export.format=hf, not {self.format.name}; leave one of them out.",
        )
