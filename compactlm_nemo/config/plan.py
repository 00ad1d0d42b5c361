"""Settings of `recipes.plan`, beside those of the run and of the cluster that it is planned for."""

from __future__ import annotations

from dataclasses import dataclass

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class PlanConfig:
    search: bool = setting(False, changes_result=False)
    """Try the layouts that these nodes allow, and list those that fit by price."""
    margin: float = setting(0.1, changes_result=False)
    """Share of a device's memory that a plan leaves free, for the allocator's gaps, the driver, what is not planned."""

    def __post_init__(self) -> None:
        require(0 <= self.margin < 1, f"plan.margin={self.margin} must be in [0, 1); try 0.1.")
