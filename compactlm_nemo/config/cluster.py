"""Settings of the cluster that a run is planned for: what its devices hold and do, what joins them, what they cost."""

from __future__ import annotations

from dataclasses import dataclass, fields

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require

PEAKS = ("memory_gib", "bf16_tflops", "fp32_tflops", "memory_gbs", "link_gbs", "network_gbs")
SHARES = ("matmul_share", "attention_share", "memory_share", "link_share")
BENEFIT = ("teacher_tokens", "served_tokens_day", "served_prompt", "served_answer", "served_batch", "served_days")
"""Settings of the plan that `plan.benefit` alone reads."""


@dataclass(kw_only=True)
class ClusterConfig:
    device: str | None = setting(None, changes_result=False)
    """Name of the device; null plans for none in particular, without memory limit, time or price."""
    devices_per_node: int = setting(8, changes_result=False)
    """Devices of a node, and ranks on it."""
    memory_gib: float = setting(80.0, changes_result=False)
    """Memory of a device that programs can have."""
    bf16_tflops: float = setting(1.0, changes_result=False)
    """Peak of dense bf16 matrix products, in TFLOP/s."""
    fp32_tflops: float = setting(1.0, changes_result=False)
    """The same in fp32."""
    memory_gbs: float = setting(1.0, changes_result=False)
    """Bandwidth of a device's memory, GB/s."""
    link_gbs: float = setting(1.0, changes_result=False)
    """What a device sends to its neighbours inside a node, one way, GB/s."""
    network_gbs: float = setting(1.0, changes_result=False)
    """What a device sends to other nodes, one way, GB/s."""
    matmul_share: float = setting(0.7, changes_result=False)
    """Share of the peak that large matrix products reach."""
    attention_share: float = setting(0.5, changes_result=False)
    """Share of the peak that attention reaches."""
    memory_share: float = setting(0.85, changes_result=False)
    """Share of the bandwidth that kernels reach."""
    link_share: float = setting(0.75, changes_result=False)
    """Share of links and network that collectives reach."""
    price_hour: float = setting(0.0, changes_result=False)
    """Price of a device for an hour, in dollars; 0 is not known."""

    @property
    def is_gpu(self) -> bool:
        """Whether its devices are GPUs, whose kernels work on other pieces."""
        return not (self.device or "").startswith("CPU")

    def __post_init__(self) -> None:
        require(
            self.devices_per_node > 0,
            f"cluster.devices_per_node={self.devices_per_node} must be > 0, the ranks of a node.",
        )
        for name in PEAKS:
            require(getattr(self, name) > 0, f"cluster.{name}={getattr(self, name)} must be > 0; see conf/cluster/.")
        for name in SHARES:
            require(0 < getattr(self, name) <= 1, f"cluster.{name}={getattr(self, name)} must be in (0, 1]; try 0.7.")
        require(self.price_hour >= 0, f"cluster.price_hour={self.price_hour} must be >= 0; 0 is not known.")


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
