"""Settings of `recipes.plan`, beside those of the run and of the cluster that it is planned for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require

BENEFIT = ("teacher_tokens", "served_tokens_day", "served_prompt", "served_answer", "served_batch", "served_days")
"""Settings of the plan that `plan.benefit` alone reads."""


@dataclass(kw_only=True)
class PlanConfig:
    search: bool = setting(False, changes_result=False)
    """Try the layouts that these nodes allow, and list those that fit by price."""
    margin: float = setting(0.1, changes_result=False)
    """Share of a device's memory that a plan leaves free, for the allocator's gaps, the driver, what is not planned."""
    benefit: bool = setting(False, changes_result=False)
    """Say whether the student is worth the run: its expected loss, a run from scratch to the same loss, what serving
    it instead of the teacher saves."""
    teacher_tokens: float | None = setting(None, changes_result=False)
    """With `plan.benefit`: tokens that the teacher was trained on, from which the loss to reach from scratch
    follows."""
    served_tokens_day: float | None = setting(None, changes_result=False)
    """With `plan.benefit`: tokens that are generated in a day."""
    served_prompt: int = setting(1000, changes_result=False)
    """With `plan.benefit`: tokens of a prompt."""
    served_answer: int = setting(200, changes_result=False)
    """With `plan.benefit`: tokens that are generated for a prompt."""
    served_batch: int = setting(64, changes_result=False)
    """With `plan.benefit`: answers that one copy of a model generates at once."""
    served_days: float = setting(365.0, changes_result=False)
    """With `plan.benefit`: days for which the student will be served, in which the run has to pay."""

    def __post_init__(self) -> None:
        require(0 <= self.margin < 1, f"plan.margin={self.margin} must be in [0, 1); try 0.1.")
        defaults = {field.name: field.default for field in fields(self)}
        for name in BENEFIT:
            value = getattr(self, name)
            require(
                self.benefit or value == defaults[name],
                f"plan.{name}={value} is read by plan.benefit=true alone; set that too, or leave it out.",
            )
            require(
                value is not None or not self.benefit,
                f"plan.{name}=null must be given with plan.benefit=true, for example plan.{name}=1e9.",
            )
            require(value is None or value > 0, f"plan.{name}={value} must be > 0; try {defaults[name] or 1e9}.")
