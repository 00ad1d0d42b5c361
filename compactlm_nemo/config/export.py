"""Settings of the Hugging Face folder that a model leaves as."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class ExportedModel(Enum):
    """Which model of a run leaves."""

    teacher = "teacher"
    student = "student"
    distilled = "distilled"


class ExportDtype(Enum):
    """Number format of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass(kw_only=True)
class ExportConfig:
    of: ExportedModel = setting(ExportedModel.distilled)
    """The teacher as imported, the student as cut and not trained yet (to train it elsewhere), or the distilled one."""
    dtype: ExportDtype | None = setting(None)
    """Number format of the weights; null takes that of the teacher's config.json, or `model.precision` where it has
    none of these."""
    shard_gib: float = setting(4.0)
    """A file of weights is closed before it would be larger than these GiB."""

    def __post_init__(self) -> None:
        require(self.shard_gib > 0, f"export.shard_gib={self.shard_gib} must be > 0; use 4.")
