"""Seconds of work on a cluster, worked out by hand."""

from __future__ import annotations

import pytest

from compactlm_nemo.config.cluster import ClusterConfig
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.planning.duration import IN_BACKWARD, JOINED, duration
from compactlm_nemo.planning.meter import Product, Work

CLUSTER = ClusterConfig(
    device="GPU", devices_per_node=8, bf16_tflops=100, fp32_tflops=10, memory_gbs=1000, link_gbs=100, network_gbs=10,
    matmul_share=0.5, attention_share=0.25, memory_share=0.5, link_share=0.5,
)  # fmt: skip


def seconds(work: Work, layout: ParallelConfig | None = None, **changes: object) -> object:
    settings = {"micro_batches": 4, "overlap": False, "trains": True} | changes
    return duration(work, CLUSTER, layout or ParallelConfig(), **settings)


def test_a_product_takes_the_longer_of_arithmetic_and_memory() -> None:
    work = Work()
    work.products[Product("matmul", "bfloat16", 10**12, 10**9)] = 2  # 1e12 / 50e12 = 20 ms > 1e9 / 500e9 = 2 ms
    work.products[Product("matmul", "float32", 10**9, 10**9)] = 3  # 0.2 ms < 2 ms
    work.products[Product("attention", "bfloat16", 10**12, 1)] = 1  # 1e12 / 25e12 = 40 ms
    got = seconds(work)
    assert got.arithmetic == pytest.approx(0.08) and got.memory == pytest.approx(0.006) and got.links == got.bubble == 0


def test_other_kernels_take_their_bytes() -> None:
    assert seconds(Work(other_bytes=10**9)).memory == pytest.approx(JOINED * 0.002)


@pytest.mark.parametrize(
    "operation, group, size, expected",
    [
        ("allgather_base", "tensor_model_parallel", 8, 7 / 8 / 50),  # in a node: 1 GB at 50 GB/s
        ("allreduce", "tensor_model_parallel", 2, 2 / 2 / 50),
        ("reduce_scatter_tensor_coalesced", "data_parallel_group_with_cp", 16, 15 / 16 / 5),  # over the network
        ("send", "pipeline_model_parallel", 2, 1 / 5),
    ],
)
def test_collectives_take_what_a_ring_sends(operation: str, group: str, size: int, expected: float) -> None:
    work = Work()
    work.sent[operation, group, size] = 10**9
    assert seconds(work).links == pytest.approx(expected)


def test_gradients_travel_beside_work_with_overlap() -> None:
    work = Work(other_bytes=0)
    work.products[Product("matmul", "bfloat16", 10**13, 1)] = 1  # 200 ms
    work.sent["reduce_scatter_tensor_coalesced", "data_parallel_group_with_cp", 16] = 8 * 10**8  # 150 ms
    plain, overlapped = seconds(work), seconds(work, overlap=True)
    assert plain.links == pytest.approx(0.15) and plain.hidden == 0
    assert overlapped.hidden == pytest.approx(IN_BACKWARD * 0.2) and overlapped.links == pytest.approx(0.05)


def test_a_pipeline_stands_still_while_it_fills() -> None:
    work = Work()
    work.products[Product("matmul", "bfloat16", 10**13, 1)] = 1
    assert seconds(work, ParallelConfig(pp=4), micro_batches=12).bubble == pytest.approx(0.2 * 3 / 12)
    assert seconds(work, ParallelConfig(pp=4, virtual_stages=2), micro_batches=12).bubble == pytest.approx(0.2 * 3 / 24)
