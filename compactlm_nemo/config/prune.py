"""Settings of the cut."""

from __future__ import annotations

from dataclasses import dataclass
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
