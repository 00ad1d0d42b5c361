"""Settings of the cut."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class HeadCut(Enum):
    """What becomes of the query heads that are cut: gone, or merged into kept ones as in the first Minitron paper."""

    cut = "cut"
    merge = "merge"


class Reconstruct(Enum):
    """Whether the maps that lose inputs are refitted to what is left of them."""

    none = "none"
    least_squares = "least_squares"


class Stream(Enum):
    """How the residual stream is narrowed: by keeping channels, or by turning it to its principal directions first."""

    select = "select"
    rotate = "rotate"


class ErrorAxis(Enum):
    """Units that can be chosen by the error that is left after refitting, in place of their scores."""

    heads = "heads"
    mlp = "mlp"


class Blocks(Enum):
    """Whether the layers of the cut student are trained, each by itself, before the student is distilled as a whole."""

    none = "none"
    distill = "distill"


class BlockInputs(Enum):
    """What a layer sees while it is trained by itself: the stream of the student, or that of the teacher."""

    student = "student"
    teacher = "teacher"


@dataclass(kw_only=True)
class PruneConfig:
    candidate: int = setting(0)
    """Index into candidates.json, best first; after `recipes.rank` into ranking.json."""
    heads: HeadCut = setting(HeadCut.cut)
    """cut, or merge: removed query heads are folded into kept ones of their group, as in the paper."""
    reconstruct: Reconstruct = setting(Reconstruct.none)
    """least_squares: maps that lose inputs are refitted on calibration data (needs `score.second_moments`)."""
    sequential: bool = setting(False)
    """Refit once more, layer by layer, on what the pruned layers before produce (needs least_squares)."""
    ridge: float = setting(1e-3)
    """Ridge of the refit as a share of the mean second moment; more trusts the calibration text less."""
    hidden: Stream = setting(Stream.select)
    """select, or rotate to principal directions first (needs least_squares and an RMSNorm model)."""
    by_error: list[ErrorAxis] = setting([])
    """Axes whose units are chosen by the error that is left after refitting, not by their scores (needs
    least_squares)."""
    blocks: Blocks = setting(Blocks.none)
    """distill: each layer is trained by itself to give what the teacher's stream is after the layers it stands for."""
    block_inputs: BlockInputs = setting(BlockInputs.student)
    """student: layers are trained one after another on the stream of those before; teacher: each on the teacher's
    stream, those of different pipeline stages at once."""
    block_lr: float = setting(5e-3)
    """Largest step of a layer's Adam, as a share of the root mean square of each weight; it falls to 0 over
    `block_passes`."""
    block_passes: int = setting(6)
    """Passes of each layer over its windows."""
    block_batch: int = setting(4)
    """Windows of one step of a layer, over all data-parallel ranks."""
    block_samples: int | None = setting(None)
    """Windows of `data.sequence_length` tokens that layers are trained on: the first ones of the training text as
    distillation draws it; null takes those that were scored."""
    samples: int = setting(16)
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
        self._check_blocks()

    def _check_blocks(self) -> None:
        if self.blocks is Blocks.none:
            default = {field.name: field.default for field in fields(self)}
            for name in BLOCK_SETTINGS:
                require(
                    getattr(self, name) == default[name],
                    f"prune.{name} needs prune.blocks=distill; set it, or leave it out.",
                )
        require(0 < self.block_lr < 1, f"prune.block_lr={self.block_lr} must be in (0, 1); 0.005 is a good start.")
        for name, value, good in (
            ("block_passes", self.block_passes, 6),
            ("block_batch", self.block_batch, 4),
            ("block_samples", self.block_samples, 256),
        ):
            require(value is None or value > 0, f"prune.{name}={value} must be > 0; try {good}.")


BLOCK_SETTINGS = ("block_inputs", "block_lr", "block_passes", "block_batch", "block_samples")
"""Settings that without `blocks=distill` have no effect."""
