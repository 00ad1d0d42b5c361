"""How long counted work takes on a cluster: arithmetic, memory and links, with what runs beside what.

- A matrix product takes the longer of its arithmetic (`matmul_share` of the peak) and of its bytes (`memory_share` of
  the bandwidth); attention likewise with `attention_share`.
- All other kernels take their bytes; on a GPU, where layers are compiled, `JOINED` of them.
- A collective sends what a ring sends, over the network where its group spans nodes. Those of tensor, context and
  expert parallelism and the pipeline's messages wait; those of data parallelism run beside the backward pass with
  `distill.overlap`, and only what is left of them waits.
- A pipeline of p stages with v chunks a stage and m micro-batches stands still for ``(p - 1) / (m v)`` of its work.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from compactlm_nemo.config.cluster import ClusterConfig
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.planning.meter import Work

JOINED = 0.4
"""Bytes that are left of separate kernels' when a compiler joins them: what RMSNorm in float32 (28 to 8 bytes an
element), SwiGLU (10 to 6) and residual sums of a layer read and write, counted by hand, weighted by their sizes."""

IN_BACKWARD = 0.5
"""Share of a step's work beside which gradients can travel: that of the student's backward pass that is left when the
first bucket is full."""


@dataclass(frozen=True)
class Duration:
    """Seconds of some work, by what they are spent on."""

    arithmetic: float
    memory: float
    """Of products that are bound by their bytes, and of all other kernels."""
    links: float
    """Collectives that work waits for."""
    hidden: float
    """Collectives that run beside work."""
    bubble: float
    """The pipeline standing still."""

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.memory + self.links + self.bubble

    def plus(self, other: Duration, times: float) -> Duration:
        """Return the sum with `times` another's."""
        return Duration(*(one + times * another for one, another in zip(astuple(self), astuple(other), strict=True)))


def duration(
    work: Work, cluster: ClusterConfig, layout: ParallelConfig, *, micro_batches: int, overlap: bool, trains: bool
) -> Duration:
    """Return how long a rank's work of one step takes."""
    peaks = {"bfloat16": cluster.bf16_tflops, "float16": cluster.bf16_tflops}
    bandwidth = cluster.memory_gbs * 1e9 * cluster.memory_share
    arithmetic = memory = 0.0
    for (kind, dtype, flops, moved), count in work.products.items():
        share = cluster.attention_share if kind == "attention" else cluster.matmul_share
        computing = flops / (peaks.get(dtype, cluster.fp32_tflops) * 1e12 * share)
        moving = moved / bandwidth
        if computing >= moving:
            arithmetic += count * computing
        else:
            memory += count * moving
    memory += work.other_bytes * (JOINED if cluster.is_gpu else 1.0) / bandwidth
    waiting = beside = 0.0
    for (operation, group, size), sent in work.sent.items():
        seconds = _sent_seconds(operation, group, size, sent, cluster, layout)
        if "data_parallel" in group and trains:
            beside += seconds
        else:
            waiting += seconds
    busy = arithmetic + memory + waiting
    hidden = min(beside, IN_BACKWARD * busy) if overlap else 0.0
    stages, chunks = layout.pp, layout.virtual_stages
    bubble = (busy * (stages - 1) / (micro_batches * chunks)) if micro_batches else 0.0
    return Duration(arithmetic, memory, waiting + beside - hidden, hidden, bubble)


def _sent_seconds(
    operation: str, group: str, size: int, sent: int, cluster: ClusterConfig, layout: ParallelConfig
) -> float:
    """Return the seconds of collectives of `sent` bytes altogether, each of the whole tensor."""
    stride = _stride(group, layout)
    leaves_node = stride * size > cluster.devices_per_node
    rate = (cluster.network_gbs if leaves_node else cluster.link_gbs) * 1e9 * cluster.link_share
    rounds = (size - 1) / size
    if "allreduce" in operation:
        rounds *= 2
    elif operation in ("send", "recv", "recv_any_source"):
        rounds = 1.0
    return rounds * sent / rate


def _stride(group: str, layout: ParallelConfig) -> int:
    """Return how far apart neighbours of a group are: Megatron places tensor, context, data, pipeline ranks so."""
    if "pipeline" in group:
        return 10**6  # stages are the farthest apart: on different nodes, unless all fit into one
    if "data_parallel" in group:
        return layout.tp if "with_cp" in group else layout.tp * layout.cp
    return layout.tp if "context" in group or "expert_model" in group else 1
