"""A `ParameterSource` that cuts another one: the student's parameters from the teacher's, one at a time.

Every rank of the student's mesh reads what it needs from the teacher's checkpoint, so the result is the same in
every layout and the extra memory is one whole parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.pruning.plan import Plan


class CutSource:
    """Student parameters: kept layers renumbered, kept heads, neurons and hidden channels in the teacher's order."""

    def __init__(self, teacher: Dims, plan: Plan, source: ParameterSource) -> None:
        self.teacher, self.plan, self.source = teacher, plan, source

    def __call__(self, name: str) -> Tensor:
        if not name.startswith("decoder.layers."):
            return self._outside_layers(self.source(name))
        _, _, layer, rest = name.split(".", 3)
        teacher_layer = self.plan.layers[int(layer)]
        full = self.source(f"decoder.layers.{teacher_layer}.{rest}")
        return self._in_layer(teacher_layer, rest, full)

    def _outside_layers(self, full: Tensor) -> Tensor:
        """Embedding and output `[V, H]`, final norm `[H]`: hidden channels only."""
        return full.index_select(full.dim() - 1, self.plan.hidden)

    def _in_layer(self, layer: int, rest: str, full: Tensor) -> Tensor:
        hidden, heads, mlp = self.plan.hidden, self.plan.heads[layer], self.plan.mlp[layer]
        if "q_layernorm" in rest or "k_layernorm" in rest:
            return full
        if "linear_qkv" in rest:
            rows = full[self._qkv_rows(heads)]
            return rows.index_select(1, hidden) if rows.dim() == 2 else rows
        if rest == "self_attention.linear_proj.weight":
            return full[hidden].index_select(1, _head_columns(heads, self.teacher.head_dim))
        if "linear_fc1" in rest:
            width = self.teacher.ffn_hidden_size
            rows = full[torch.cat([mlp + width * half for half in range(full.shape[0] // width)])]
            return rows.index_select(1, hidden) if rows.dim() == 2 else rows
        if rest == "mlp.linear_fc2.weight":
            return full[hidden].index_select(1, mlp)
        return full[hidden]

    def _qkv_rows(self, heads: Tensor) -> Tensor:
        """Rows of the fused projection: per group the kept query heads, then its key and value head."""
        groups = self.teacher.num_query_groups
        per_group = self.teacher.num_heads // groups
        blocks = []
        for group in range(groups):
            mine = heads[(heads >= group * per_group) & (heads < (group + 1) * per_group)] + 2 * group
            first_kv = group * (per_group + 2) + per_group
            blocks.append(torch.cat([mine, torch.tensor([first_kv, first_kv + 1])]))
        return _head_columns(torch.cat(blocks), self.teacher.head_dim)


def _head_columns(heads: Tensor, head_dim: int) -> Tensor:
    """Indices of all channels of the given heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
