"""Settings of the cluster that a run is meant for: what its devices hold and do, what joins them, what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require

PEAKS = ("memory_gib", "bf16_tflops", "fp32_tflops", "memory_gbs", "link_gbs", "network_gbs", "read_gbs", "write_gbs")
SHARES = ("matmul_share", "attention_share", "memory_share", "link_share")


@dataclass(kw_only=True)
class ClusterConfig:
    device: str | None = setting(None, changes_result=False)
    """Name of the device; null is none in particular, for which nothing can be planned."""
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
    read_gbs: float = setting(4.0, changes_result=False)
    """What a node reads from the file system, GB/s; NVIDIA's guide for its SuperPODs asks for 4 at least."""
    write_gbs: float = setting(2.0, changes_result=False)
    """What a node writes to the file system, GB/s; half of what it reads, as that guide has it."""
    price_hour: float = setting(0.0, changes_result=False)
    """Price of a device for an hour, in dollars; 0 is not known."""

    @property
    def is_gpu(self) -> bool:
        """Whether its devices are GPUs, whose kernels work on other pieces."""
        return not (self.device or "").startswith("CPU")

    def usable_bytes(self, margin: float) -> float:
        """Return the bytes of a device that are left where a share of its memory stays free."""
        return self.memory_gib * 2**30 * (1 - margin)

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
