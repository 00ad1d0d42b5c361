"""Settings of work that runs stages more than once: short distillations that rank, and pruning in rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require

LOSS = "loss"
"""The name of the distillation's validation loss in `rank.by`."""


@dataclass(kw_only=True)
class RoundsConfig:
    """Iterative pruning (`recipes.rounds`)."""

    count: int = setting(2, changes_result=False)
    """Rounds of score and prune; 1 is what recipes.compress does."""
    steps: int = setting(0, changes_result=False)
    """Optimizer steps of distillation after each round but the last, which trains `distill.steps`; 0 is none."""

    def __post_init__(self) -> None:
        require(self.count > 0, f"rounds.count={self.count} must be > 0; 1 prunes at once.")
        require(self.steps >= 0, f"rounds.steps={self.steps} must be >= 0; 0 trains only after the last round.")


@dataclass(kw_only=True)
class RankConfig:
    """Short distillation of the best candidates, which decides between them (`recipes.rank`)."""

    candidates: int = setting(0, changes_result=False)
    """Candidates to train, best first; 0 takes the first of candidates.json without."""
    steps: int = setting(400, changes_result=False)
    """Optimizer steps of each; the learning rate falls over these. The paper trains 400, and ranks settle near 300."""
    halving: int = setting(0, changes_result=False)
    """Times that the worse half is dropped on the way, at 1/2, 1/4, ... of the steps from the end; 0 trains all."""
    only: int | None = setting(None, changes_result=False)
    """Train this candidate alone and rank nothing: one task of a Slurm array. Needs `rank.halving=0`."""

    by: dict[str, float] = setting({}, changes_result=False)
    """What decides between them, best first: the least of weight x `loss` - weight x accuracy, over the names of
    `evaluate.choices` and `evaluate.tasks` that have a weight, as in `rank.by.loss=1 rank.by.own=2`. Empty is the loss
    alone. With accuracies each candidate is evaluated too."""

    @property
    def tasks(self) -> list[str]:
        """The accuracies that decide."""
        return [name for name in self.by if name != LOSS]

    def rounds(self) -> list[int]:
        """Return steps at which the worse half is dropped, and the last: 100, 200, 400 with two halvings of 400."""
        return [self.steps // 2**left for left in range(self.halving, 0, -1)] + [self.steps]

    def __post_init__(self) -> None:
        require(self.candidates >= 0, f"rank.candidates={self.candidates} must be >= 0; 0 trains none.")
        require(self.steps > 0, f"rank.steps={self.steps} must be > 0.")
        require(
            0 <= self.halving < self.steps.bit_length(),
            f"rank.halving={self.halving} must be >= 0 and leave a step of rank.steps={self.steps} to each round.",
        )
        require(
            self.only is None or (0 <= self.only < self.candidates and not self.halving),
            f"rank.only={self.only} must be in [0, rank.candidates={self.candidates}), with rank.halving=0.",
        )
        for name, weight in self.by.items():
            require(
                0 < weight < math.inf, f"rank.by has {name}: {weight}, which must be a number > 0; or leave it out."
            )
        require(
            not (self.by and self.halving and LOSS not in self.by),
            "rank.halving drops candidates by their loss on the way; add loss to rank.by, or set rank.halving=0.",
        )
