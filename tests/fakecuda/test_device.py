"""The fake device counts what a card would do; each rule of it against what CUDA's manual or torch's source says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.fakecuda.cluster import cluster, skip_without_fake_cuda

skip_without_fake_cuda()


def x(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device="cuda")


WAITING = {
    "item": lambda: x(1).item(),
    "bool": lambda: bool(x(1) > 0),
    "cpu": lambda: x(3).cpu(),
    "copy to the host": lambda: torch.zeros(3).copy_(x(3)),
    "nonzero": lambda: x(3).nonzero(),
    "mask": lambda: x(3)[x(3) > 0],
    "masked_select": lambda: x(3).masked_select(x(3) > 0),
    "synchronize": lambda: torch.cuda.synchronize(),
    "event": lambda: torch.cuda.Event().synchronize(),
    "solve": lambda: torch.linalg.solve(x(2, 2), x(2)),
    "to the device": lambda: torch.zeros(3).cuda(),
    "index on the host": lambda: x(3)[torch.tensor([0, 1])],
    "mask on the host": lambda: x(3)[torch.tensor([True, False, True])],
    "new values": lambda: torch.tensor([1.0], device="cuda"),
    "barrier": lambda: dist.barrier(),
}
QUEUED = {
    "cpu without waiting": lambda: x(3).to("cpu", non_blocking=True),
    "arithmetic": lambda: (x(3) + 1) * torch.tensor(2.0),
    "index": lambda: x(3)[torch.arange(2, device="cuda")],
    "fill by mask": lambda: x(3).__setitem__(x(3) > 0, 0),
    "where": lambda: torch.where(x(3) > 0, x(3), 0),
    "full": lambda: torch.full((), 3.0, device="cuda"),
    "pinned": lambda: torch.zeros(3).pin_memory().to("cuda", non_blocking=True),
    "on the device": lambda: x(3).copy_(x(3)),
    "all-reduce": lambda: dist.all_reduce(x(3)),
}


@pytest.mark.parametrize("name", [*WAITING, *QUEUED])
def test_the_host_waits_where_it_would_on_a_card(name):
    with cluster(world=2) as there:
        {**WAITING, **QUEUED}[name]()
    assert there.counts.waits.total() == (1 if name in WAITING else 0)


def test_a_list_of_values_is_read_one_by_one():
    with cluster() as there:
        torch.tensor([x(1)[0], x(1)[0]])
    assert there.counts.waits.total() == 2


def test_tensors_on_two_devices_are_refused():
    with cluster():
        with pytest.raises(RuntimeError, match="device"):
            x(3) + torch.zeros(3)
        with pytest.raises((RuntimeError, IndexError), match="device|indices"):
            torch.zeros(3)[torch.arange(2, device="cuda")]
        with pytest.raises(RuntimeError, match="No backend type"):
            dist.all_reduce(torch.zeros(3))
        assert (torch.zeros(3) + 1).tolist() == [1, 1, 1]  # the host is real


def test_values_that_were_copied_come_back_until_they_are_written():
    with cluster():
        sent = torch.tensor([5, 7], device="cuda")
        assert sent.tolist() == [5, 7]
        assert sent.add_(1).tolist() == [1, 1]


def test_kernels_read_and_write_the_bytes_of_their_tensors():
    with cluster() as there:
        a, b = x(100), x(1).expand(100)
        there.counts.clear()
        a + b
        a.add_(b)
        a.zero_()
        a.view(10, 10)
        torch.mm(x(4, 8), x(8, 2))
    assert there.counts.kernel_bytes["add"] == 4 * (100 + 1 + 100)
    assert there.counts.kernel_bytes["add_"] == 4 * (100 + 1 + 100)
    assert there.counts.kernel_bytes["zero_"] == 4 * 100
    assert "view" not in there.counts.kernels
    assert there.counts.flops["mm"] == 2 * 4 * 8 * 2
    assert there.counts.elementwise_bytes == 4 * (201 + 201 + 100 + 32 + 16)


def test_collectives_are_counted_by_group_and_bytes():
    with cluster(world=8, tp=2) as there:
        dist.all_reduce(x(3), group=there.mesh.tp_group)
        dist.all_gather([x(5) for _ in range(4)], x(5), group=there.mesh.dp_group)
    assert {(key.kind, key.size): there.counts.collective_bytes[key] for key in there.counts.collectives} == {
        ("allreduce", 2): 12,
        ("allgather", 4): 80,
    }


def test_attention_without_a_fused_kernel_is_math():
    def attend(dtype, heads, groups, **options):
        q, k = (torch.zeros(1, n, 256, 64, dtype=dtype, device="cuda") for n in (heads, groups))
        F.scaled_dot_product_attention(q, k, k, **options)

    with cluster() as there:
        attend(torch.bfloat16, 8, 2, is_causal=True, enable_gqa=True)
        assert "math" not in there.counts.attention
        attend(torch.float32, 8, 2, is_causal=True, enable_gqa=True)
    assert there.counts.attention["math"] == 1


def test_a_place_is_a_line_of_the_package():
    from compactlm_nemo.parallel.collectives import all_reduce_sum

    with cluster(world=2) as there:
        all_reduce_sum(x(3), dist.group.WORLD).cpu()
        [place] = there.counts.waits
        assert place == ("", "", "")  # the test itself
        there.counts.clear()
        from compactlm_nemo.parallel.collectives import last_stage_total

        last_stage_total(x(3), there.mesh)
    [place] = there.counts.waits
    assert place.file == "parallel/collectives.py" and place.function == "last_stage_total" and ".cpu()" in place.text
