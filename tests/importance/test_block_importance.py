"""Block importance against hooks on transformers' model in float64. Its layouts are those of test_depth.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.importance.block_importance import block_importance, state_cosines
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.mesh import Mesh
from tests.support.tiny_models import VOCAB


def windows() -> Tensor:
    """Five samples: neither two data-parallel ranks nor micro-batches of two come out even."""
    return torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(11))


@torch.no_grad()
def block_reference(model: Any, ids_NS: Tensor) -> Tensor:
    """`[L, L]`: every block by itself, from the states before each layer and after the last."""
    states: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _, args: states.append(args[0])) for m in model.model.layers]
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    model(ids_NS, use_cache=False)
    for handle in handles:
        handle.remove()
    num_layers = len(states) - 1
    want = torch.full((num_layers, num_layers), math.nan, dtype=torch.float64)
    for i in range(num_layers):
        for n in range(1, num_layers - i + 1):
            before, after = states[i], states[i + n]
            lengths = (before.pow(2).sum(-1) * after.pow(2).sum(-1)).sqrt()
            want[i, n - 1] = 1 - ((before * after).sum(-1) / lengths).mean()
    return want


def check_blocks(model: ModelChunks, dims: Dims, mesh: Mesh, want: Tensor) -> None:
    """The windows in two parts, as a run that keeps its progress measures them."""
    told: list[int] = []
    cosines = sum(
        state_cosines(model, part_NS, micro_batch=2, progress=told.append) for part_NS in windows().split([3, 2])
    )
    assert sum(told) == 5
    got = block_importance(cosines, 5 * 12)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_block_that_turns_every_state_by_a_right_angle_has_importance_one():
    cosines = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    want = torch.tensor([[0.0, 1.0], [1.0, math.nan]])
    torch.testing.assert_close(block_importance(cosines, tokens=4), want, rtol=0, atol=0, equal_nan=True)
