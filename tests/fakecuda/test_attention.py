"""Which kernel attention runs on a card: never the one that writes all scores to memory.

Runs on fake CUDA devices alone (`make fakecuda`); torch chooses a kernel from shapes, dtypes and the device's name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from compactlm_nemo.models import attention
from compactlm_nemo.models.attention import AttentionMask, SdpaCoreAttention
from tests.fakecuda.device import IS_HERE, REASON
from tests.support.attention_kernels import AttentionKernels

pytestmark = pytest.mark.skipif(not IS_HERE, reason=REASON)

SAMPLES, LENGTH, HEADS, WIDTH = 2, 1024, 8, 128
DTYPES = [torch.float32, torch.bfloat16]
MASKS = {"causal": {}, "documents": {"document_end": 2}, "window": {"window": 300}, "context": {"cp": 2}}


def kernels_of(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, groups: int, *, window: Any = None, document_end: Any = None,
    cp: int = 1, width: int = WIDTH, has_sinks: bool = False,
) -> set[str]:  # fmt: skip
    """Return the kernels of a forward and a backward pass through the package's attention."""
    group: Any = SimpleNamespace(rank=lambda: 0)
    monkeypatch.setattr(attention, "all_gather", lambda x, group, dim: torch.cat([x] * cp, dim=dim))
    monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", lambda x, group: torch.cat([x] * cp))
    config: Any = SimpleNamespace(
        context_parallel_size=cp, params_dtype=dtype, window_size=None if window is None else (window - 1, 0),
        softmax_scale=None, local_layers=None, softmax_type="learnable" if has_sinks else "vanilla",
        num_attention_heads=HEADS, tensor_model_parallel_size=1,
    )  # fmt: skip
    with FakeTensorMode(), AttentionKernels() as kernels:
        tokens_BS = torch.zeros(SAMPLES, LENGTH, dtype=torch.long, device="cuda")
        mask = AttentionMask(config, group)(tokens_BS, document_end)
        with torch.device("cuda"):
            core = SdpaCoreAttention(config, pg_collection=SimpleNamespace(cp=group))
        query, key, value = (
            torch.zeros(LENGTH, SAMPLES, heads, width, dtype=dtype, device="cuda", requires_grad=True)
            for heads in (HEADS, groups, groups)
        )
        out = core(query, key, value, mask)
        assert out.shape == (LENGTH, SAMPLES, HEADS * width) and out.is_cuda
        out.sum().backward()
        assert key.grad is not None and key.grad.shape == key.shape
    return kernels.seen


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_cudnn", [True, False], ids=["cudnn", "no_cudnn"])
@pytest.mark.parametrize("sinks", [{}, {"has_sinks": True, "width": 64}], ids=["", "sinks"])
def test_attention_runs_a_fused_kernel(monkeypatch, sinks, has_cudnn, dtype, groups, mask):
    if not has_cudnn:  # as on devices before Hopper and in torch 2.9
        others = [kernel for kernel in attention.FUSED_KERNELS if kernel is not SDPBackend.CUDNN_ATTENTION]
        monkeypatch.setattr(attention, "FUSED_KERNELS", others)
    kernels = kernels_of(monkeypatch, dtype, groups, **MASKS[mask], **sinks)
    assert len(kernels) == 2, kernels  # forward and backward
    assert not [name for name in kernels if "softmax" in name or name.endswith("_math")]


def test_torch_alone_would_write_the_scores_of_grouped_float32_queries():
    with FakeTensorMode(), AttentionKernels() as kernels:
        query, key = (torch.zeros(1, heads, LENGTH, WIDTH, device="cuda") for heads in (HEADS, 2))
        F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    assert [name for name in kernels.seen if "softmax" in name]
