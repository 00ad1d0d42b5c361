"""Settings of `recipes.plan`: those of the run that is planned, and of the cluster that it is planned for."""

from __future__ import annotations

from dataclasses import dataclass, field

from compactlm_nemo.config.cluster import ClusterConfig, PlanConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class PlannedRun(Config):
    """A run, and where it will be."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster; cluster=NAME takes conf/cluster/NAME.yaml."""
    nodes: int = 1
    """Nodes of the job."""
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        require(self.nodes > 0, f"nodes={self.nodes} must be > 0.")
