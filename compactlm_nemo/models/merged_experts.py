"""Weights of one expert, in Megatron's order, and of all experts of a layer in one tensor, as gpt-oss stores them.

    gate_up_proj [E, H, 2F]   gate_up_proj_bias [E, 2F]   down_proj [E, F, H]   down_proj_bias [E, H]

Columns of gate and up take turns: gate 0, up 0, gate 1, ... A matrix may also be packed as MXFP4 (Open Compute Project,
Microscaling Formats 1.0), then as `NAME_blocks` and `NAME_scales`, whose rows are its columns.

Shape suffixes: E experts, H hidden, F width of an expert, O and I outputs and inputs of a matrix, G groups of 32
inputs, B the 16 bytes of a group.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of a packed matrix."""
GROUP = 32
"""Inputs that share a scale."""

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the three lower bits of an E2M1 number; the fourth is its sign."""


def expert_number(name: str) -> int:
    """Return which expert a Megatron parameter is of."""
    match = re.search(r"\.local_experts\.(\d+)\.", name)
    assert match is not None
    return int(match[1])


def from_merged(name: str, part: Tensor) -> Tensor:
    """Return a Megatron parameter from its expert's entry in the merged tensor: `[I, O]` -> `[O, I]`, or a bias."""
    rows = _transposed(part)
    return torch.cat([rows[::2], rows[1::2]]) if ".linear_fc1." in name else rows.contiguous()


def to_merged(name: str, full: Tensor) -> Tensor:
    """Return an expert's entry of the merged tensor: the inverse of `from_merged`."""
    rows = torch.stack(full.chunk(2), dim=1).flatten(0, 1) if ".linear_fc1." in name else full
    return _transposed(rows).contiguous()


def _transposed(x: Tensor) -> Tensor:
    return x if x.ndim == 1 else x.T


def packed_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the two tensors that hold a merged matrix `[E, I, O]` as MXFP4."""
    experts, inputs, outputs = shape
    return {
        name + BLOCKS: (experts, outputs, inputs // GROUP, GROUP // 2),
        name + SCALES: (experts, outputs, inputs // GROUP),
    }


def unpacked(blocks_OGB: Tensor, scales_OG: Tensor) -> Tensor:
    """Return one expert's entry of a merged matrix, `[I, O]` bfloat16, from bytes that hold two inputs each.

    ``value * 2^(scale - 127)``, the input of the lower four bits first. Exact wherever bfloat16 has the result.
    """
    values = torch.tensor([*_FP4, *(-value for value in _FP4)], device=blocks_OGB.device)
    pairs_OGB2 = values[torch.stack([blocks_OGB & 15, blocks_OGB >> 4], dim=-1).int()]
    exponent_OG1 = scales_OG.int()[..., None] - 127
    return torch.ldexp(pairs_OGB2.flatten(-2), exponent_OG1).to(torch.bfloat16).flatten(-2).T
