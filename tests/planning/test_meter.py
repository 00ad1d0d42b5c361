"""The meter's bytes and counts against numbers counted by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compactlm_nemo.planning.meter import TEMPORARY, Meter, Product, Work


def test_live_bytes_are_those_of_storages() -> None:
    with Meter() as meter:
        x = torch.zeros(100, 10)  # 4,000 bytes
        view = x[:50].T  # the same storage
        y = x + 1
        assert meter.live == {TEMPORARY: 8000} and meter.peak.bytes == 8000
        del y
        assert meter.live == {TEMPORARY: 4000} and meter.peak.bytes == 8000
        meter.start_peak()
        assert meter.peak.bytes == 4000
        del x
        assert meter.live == {TEMPORARY: 4000}
        del view
        assert meter.live == {}


def test_bytes_have_kinds() -> None:
    before = torch.zeros(5, dtype=torch.float64)
    with Meter() as meter:
        weights = torch.zeros(10)
        meter.name([weights, before], "parameters")
        kept, passing = torch.zeros(3), torch.zeros(2)
        meter.keep("activations")
        later = torch.zeros(1)
        assert meter.live == {"parameters": 80, "activations": 20, TEMPORARY: 4}
        assert meter.peak.by_kind == {"parameters": 80, "activations": 20, TEMPORARY: 4} or meter.peak.bytes == 104
        del kept, passing, later
        assert meter.live == {"parameters": 80}
        meter.start_peak()
        x = torch.zeros(7)
        assert meter.peak.bytes == 108 and meter.peak.by_kind == {"parameters": 80, TEMPORARY: 28}
    del x


def test_memory_that_others_lie_in_counts_once() -> None:
    with Meter() as meter:
        x = torch.zeros(10)
        alias = torch.from_dlpack(x)
        meter.ignore([alias])
        part = alias.view(5, 2)
        assert meter.live == {TEMPORARY: 40}
        del x, alias
        assert meter.live == {TEMPORARY: 40}
        del part
        assert meter.live == {}


def test_what_backward_keeps_is_alive_until_then() -> None:
    with Meter() as meter:
        weight = torch.ones(4, 4, requires_grad=True)
        out = (torch.ones(8, 4) @ weight).sigmoid().sum()
        kept = meter.live[TEMPORARY]
        out.backward()
        del out
        assert kept == 64 + 128 + 128 + 4  # weight, input, what sigmoid gives, the sum
        assert meter.live[TEMPORARY] == 64 + 64  # weight and its gradient


def test_products_are_counted_with_what_they_read_and_write() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    with Meter() as meter:
        a @ b
        a @ b
        a.bfloat16() @ b.bfloat16()
        a + a
    assert meter.work.products == {
        Product("matmul", "float32", 2 * 3 * 5 * 7, 4 * (15 + 35 + 21)): 2,
        Product("matmul", "bfloat16", 2 * 3 * 5 * 7, 2 * (15 + 35 + 21)): 1,
    }
    casts = 15 * (4 + 2) + 35 * (4 + 2)
    assert meter.work.other_bytes == casts + 3 * 60
    assert meter.work.total_flops == 3 * 210


def test_products_in_place_are_counted() -> None:
    total = torch.zeros(3, 7)
    with Meter() as meter:
        total.addmm_(torch.zeros(3, 5), torch.zeros(5, 7))
    assert meter.work.total_flops == 210


def test_causal_attention_reads_the_keys_before_a_query() -> None:
    batch, heads, length, width = 2, 4, 9, 8
    x = torch.zeros(batch, heads, length, width, requires_grad=True)
    with Meter() as meter:
        F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
    keys = sum(query + 1 for query in range(length))
    once = 2 * batch * heads * keys * width
    of_attention = [p.flops for p in meter.work.products if p.kind == "attention"]
    assert sorted(of_attention) == [2 * once, 5 * once]
    assert {p.dtype for p in meter.work.products if p.kind == "attention"} == {"float32"}


def test_work_adds_up() -> None:
    one, two = Work(other_bytes=10, kernels=1), Work(other_bytes=30, kernels=2)
    one.products[Product("matmul", "float32", 5, 6)] = 2
    two.products[Product("matmul", "float32", 5, 6)] = 4
    two.sent["send", "tp", 2] = 8
    total = one.plus(two, 0.5)
    assert (total.other_bytes, total.kernels, total.total_flops, total.sent["send", "tp", 2]) == (25, 2, 20, 4)
