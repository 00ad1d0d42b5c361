"""Settings of work that runs stages more than once: short distillations that rank, and pruning in rounds."""

from __future__ import annotations

from dataclasses import dataclass

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


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
