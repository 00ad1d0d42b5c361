"""The mask of a micro-batch against its definition, and keys and values that several query heads share."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.models.attention import AttentionMask, SdpaCoreAttention, for_each_head
from compactlm_nemo.models.layout import context_positions

LENGTH = 12
END = 3
TOKENS = torch.tensor([[5, 3, 1, 2, 3, 3, 8, 9, 4, 7, 6, 3], [3, 1, 1, 1, 2, 2, 2, 9, 3, 5, 5, 5]])


def mask_of(
    window: int | None,
    size: int = 1,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    local_layers: list[bool] | None = None,
    softmax_type: str = "vanilla",
) -> AttentionMask:
    config: Any = SimpleNamespace(
        context_parallel_size=size, params_dtype=dtype, window_size=None if window is None else (window - 1, 0),
        local_layers=local_layers, softmax_type=softmax_type,
    )  # fmt: skip
    group: Any = SimpleNamespace(rank=lambda: rank)
    return AttentionMask(config, group)


def attends(query: int, key: int, window: int | None, sample: list[int] | None = None) -> bool:
    """Whether the token at place `query` sees the one at `key`; a document begins with the token that ends another."""
    is_before = key <= query and (window is None or query - key < window)
    return is_before and (sample is None or END not in sample[key + 1 : query + 1])


@pytest.mark.parametrize("window", [None, 1, 4, LENGTH - 1])
@pytest.mark.parametrize("document_end", [None, END])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_zero_where_a_token_attends_and_minus_infinity_elsewhere(window, document_end, dtype):
    got = mask_of(window, dtype=dtype)(TOKENS, document_end)
    if window is None and document_end is None:
        assert got is None
        return
    assert got is not None and got.dtype is dtype
    for b, sample in enumerate(TOKENS.tolist()):
        rows = got.expand(len(TOKENS), 1, LENGTH, LENGTH)[b, 0]
        for q in range(LENGTH):
            for k in range(LENGTH):
                want = attends(q, k, window, None if document_end is None else sample)
                assert rows[q, k] == (0 if want else -math.inf), (b, q, k)


@pytest.mark.parametrize("document_end", [None, END])
def test_global_and_local_layers_have_a_mask_each(document_end):
    got = mask_of(4, local_layers=[True, False])(TOKENS, document_end)
    assert got is not None and got.shape[0] == 2
    for kind, window in enumerate((None, 4)):
        rows = got[kind].expand(len(TOKENS), 1, LENGTH, LENGTH)
        for b, sample in enumerate(TOKENS.tolist()):
            for q in range(LENGTH):
                for k in range(LENGTH):
                    want = attends(q, k, window, None if document_end is None else sample)
                    assert rows[b, 0, q, k] == (0 if want else -math.inf), (kind, b, q, k)
    assert mask_of(LENGTH, local_layers=[True, False])(TOKENS, None) is None, "no window binds"


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_of_a_context_sees_the_gathered_keys_in_the_order_of_the_ranks(window, rank):
    parts = [TOKENS[:, :4] * 0 + place for place in range(3)]
    got = mask_of(window, size=3, rank=rank)(parts[rank], None)
    assert got is not None and got.shape == (1, 1, 4, LENGTH)
    order = [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    for q, place in enumerate(order[4 * rank : 4 * rank + 4]):
        for k, other in enumerate(order):
            assert got[0, 0, q, k] == (0 if attends(place, other, window) else -math.inf)


def test_a_mask_without_documents_is_made_once_for_a_length():
    mask = mask_of(window=4)
    first = mask(TOKENS, None)
    assert mask(TOKENS.flip(0), None) is first
    assert mask(TOKENS[:, :8], None).shape == (1, 1, 8, 8)
    assert mask(TOKENS, END) is not mask(TOKENS, END)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_places_of_all_ranks_are_the_whole_sequence(size):
    places = [context_positions(8, rank, size, torch.device("cpu")) for rank in range(size)]
    assert torch.cat(places).sort().values.tolist() == list(range(8 * size))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sample by sums over numbers: query head n reads group n // (heads / groups)."""
    heads, length, width = q.shape[1:]
    out = torch.zeros_like(q)
    for n in range(heads):
        g = n // (heads // k.shape[1])
        for s in range(length):
            scores = torch.stack([(q[0, n, s] * k[0, g, t]).sum() / width**0.5 for t in range(s + 1)])
            weights = (scores - scores.max()).exp()
            weights = weights / weights.sum()
            out[0, n, s] = sum(weights[t] * v[0, g, t] for t in range(s + 1))
    return out


def test_attention_of_every_head_by_itself_is_grouped_attention_with_its_gradients():
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 6, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    q, k, v = inputs
    got = F.scaled_dot_product_attention(q, for_each_head(k, 6), for_each_head(v, 6), is_causal=True)
    want = attention(q, k, v)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def attention_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None, end: int | None) -> Tensor:
    """Attention by sums over numbers, `[S, B, heads * D]`: a head's sink is a term of the denominator and no more."""
    length, samples, heads, width = q.shape
    rows = []
    for s in range(length):
        for b in range(samples):
            for n in range(heads):
                sample = None if end is None else TOKENS[b].tolist()
                seen = [t for t in range(length) if attends(s, t, window, sample)]
                g = n // (heads // k.shape[2])
                weights = [((q[s, b, n] * k[t, b, g]).sum() / width**0.5).exp() for t in seen]
                total = sinks[n].exp() + sum(weights)
                rows.append(sum(weight * v[t, b, g] for t, weight in zip(seen, weights, strict=True)) / total)
    return torch.stack(rows).view(length, samples, heads * width)


@pytest.mark.parametrize(("window", "end"), [(None, None), (4, None), (None, END), (4, END)])
def test_sinks_are_terms_of_the_denominators(window: int | None, end: int | None) -> None:
    """Values, and gradients of queries, keys, values and sinks, in float64; heads share keys and values."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(LENGTH, 2, 6, 4), (LENGTH, 2, 2, 4), (LENGTH, 2, 2, 4)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    config: Any = SimpleNamespace(
        context_parallel_size=1, softmax_type="learnable", num_attention_heads=6, tensor_model_parallel_size=1,
        params_dtype=torch.float64, softmax_scale=None,
    )  # fmt: skip
    core = SdpaCoreAttention(config)
    assert core.softmax_offset is not None
    with torch.no_grad():
        core.softmax_offset.copy_(torch.tensor([0.0, -3.0, 2.0, 5.0, 1.0, -0.5]))
    mask = mask_of(window, dtype=torch.float64, softmax_type="learnable")(TOKENS, end)
    assert (mask is None) == (window is None and end is None)
    got, inputs = core(q, k, v, mask), [q, k, v, core.softmax_offset]
    want = attention_with_sinks(q, k, v, core.softmax_offset, window, end)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_sinks_in_bfloat16_are_as_near_as_bfloat16_is(window: int | None) -> None:
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(LENGTH, 2, heads, 64, generator=generator).bfloat16() for heads in (6, 2, 2))
    config: Any = SimpleNamespace(
        context_parallel_size=1, softmax_type="learnable", num_attention_heads=6, tensor_model_parallel_size=1,
        params_dtype=torch.bfloat16, softmax_scale=None,
    )  # fmt: skip
    core = SdpaCoreAttention(config)
    assert core.softmax_offset is not None
    with torch.no_grad():
        core.softmax_offset.copy_(torch.tensor([0.0, -3.0, 2.0, 5.0, 1.0, -0.5]))
        got = core(q, k, v, mask_of(window, dtype=torch.bfloat16, softmax_type="learnable")(TOKENS, None))
        inputs = [x.double() for x in (q, k, v, core.softmax_offset)]
        want = attention_with_sinks(*inputs, window, None)
    assert got.dtype is torch.bfloat16
    assert (got.double() - want).norm() / want.norm() < 0.01


def test_a_mask_for_sinks_has_their_columns_behind_the_others() -> None:
    plain = mask_of(4)(TOKENS, None)
    got = mask_of(4, softmax_type="learnable")(TOKENS, None)
    assert plain is not None and got is not None and got.shape == (1, 1, LENGTH, LENGTH + 16)
    assert torch.equal(got[..., :LENGTH], plain)
    assert bool((got[..., LENGTH] == 0).all()) and bool((got[..., LENGTH + 1 :] == -math.inf).all())
