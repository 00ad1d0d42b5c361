"""A cut is a `ParameterSource` over another one: it makes the student's parameters from the teacher's, one at a time.

Every rank of the student's mesh reads its parameters from the teacher's checkpoint, so the result is equal in every
layout and the extra memory is one whole parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from compactlm_nemo.importance.names import FINAL_NORM, attention_norm_key, mlp_norm_key
from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER
from compactlm_nemo.pruning.least_squares import columns_of
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.pruning.residual_stream import TABLE_ROWS, HiddenCut, scaled

EXPERT = re.compile(r"(mlp\.experts\.local_experts\.)(\d+)(\..*)")
"""Matches the parameter of a routed expert in its layer; the second group is the expert's number."""


ATTENTION_READERS = [
    f"self_attention.{name}.weight"
    for name in ("linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_kv_down_proj")
]
"""Parameters of attention that read the stream."""


class CutSource:
    """The teacher with layers and units removed and its residual stream as wide as before.

    Kept layers and experts are renumbered; kept heads, groups and neurons stay in the teacher's order. Of the router
    the rows (and biases) of kept experts stay: where gates are scaled to sum to 1 over the picked experts the softmax
    does the rest, elsewhere the softmax over fewer experts gives each expert a larger gate; sigmoids know nothing of
    each other. Where queries, keys and values are made from latents a head's rows and columns go together; latents stay
    whole, and so do the MLPs of dense layers among layers with experts.
    """

    def __init__(self, teacher: Dims, plan: Plan, source: ParameterSource) -> None:
        self.teacher, self.plan, self.source = teacher, plan, source

    def __call__(self, name: str) -> Tensor:
        if not name.startswith("decoder.layers."):
            return self.source(name)
        student_layer, rest = split_name(name)
        layer = self.plan.layers[student_layer]
        if expert := EXPERT.fullmatch(rest):
            teacher_expert = int(self.plan.experts[layer][int(expert[2])])
            full = self.source(f"decoder.layers.{layer}.{expert[1]}{teacher_expert}{expert[3]}")
            return _cut_mlp(rest, full, self.plan.expert_mlp[layer][teacher_expert], self.teacher.ffn_hidden_size)
        full = self.source(f"decoder.layers.{layer}.{rest}")
        if "linear_qkv" in rest:
            return self._cut_qkv(layer, full)
        if rest == "self_attention.linear_proj.weight":
            return full.index_select(1, columns_of(self.plan.heads[layer], self.teacher.head_dim))
        if (rows := self._rows_of_head(rest)) is not None:
            return full[columns_of(self.plan.heads[layer], rows)]
        if rest.endswith("softmax_offset"):
            return self._cut_sinks(layer, full)
        if rest.startswith("mlp.router."):
            return full[self.plan.experts[layer]]
        if rest.startswith("mlp.shared_experts.linear"):
            return _cut_mlp(rest, full, self.plan.shared_expert[layer], self.teacher.shared_expert_ffn)
        if rest.startswith("mlp.linear") and layer in self.plan.mlp:
            return _cut_mlp(rest, full, self.plan.mlp[layer], self.teacher.ffn_hidden_size)
        return full

    def _rows_of_head(self, rest: str) -> int | None:
        """Return the rows that a head has of what makes queries, or keys and values, from latents; None elsewhere."""
        teacher, kind = self.teacher, rest.removeprefix("self_attention.")
        if kind == "linear_kv_up_proj.weight":
            return teacher.qk_nope_head_dim + teacher.head_dim
        return teacher.qk_head_dim if kind in ("linear_q_proj.weight", "linear_q_up_proj.weight") else None

    def _cut_qkv(self, layer: int, full: Tensor) -> Tensor:
        """Take per kept group its kept query heads, merged as the plan says, then its key and value head.

        The paper's merge adds to a kept head what a removed one differs by, ``head_i + (head_i - head_j)``. Heads of
        one group share keys and values and differ in their queries alone, and a head's output is linear in its query
        to first order: ``head(q) ~ head(q_i) + J (q - q_i)``. So the merged head is the head of the query
        ``2 q_i - q_j``, whose projection has the weights (and bias) ``2 W_i - W_j``; the output projection stays.
        """
        heads_per_group = self.teacher.num_heads // self.teacher.num_query_groups
        blocks = full.unflatten(0, (-1, self.teacher.head_dim))  # one for each query, key and value head
        block_of = lambda head: head + 2 * (head // heads_per_group)  # noqa: E731
        pairs = self.plan.merge.get(layer, [])
        merged = {head: 2 * blocks[block_of(head)] - blocks[block_of(removed)] for head, removed in pairs}
        rows: list[Tensor] = []
        heads: list[int] = self.plan.heads[layer].tolist()
        for group in sorted({head // heads_per_group for head in heads}):
            of_group = [head for head in heads if head // heads_per_group == group]
            rows += [merged.get(head, blocks[block_of(head)]) for head in of_group]
            first_kv = (group + 1) * (heads_per_group + 2) - 2
            rows += [blocks[first_kv], blocks[first_kv + 1]]
        return torch.cat(rows)

    def _cut_sinks(self, layer: int, full: Tensor) -> Tensor:
        """Take the sinks of kept heads; a merged head is linear in its sink too, to first order (`_cut_qkv`)."""
        sinks = full.clone()
        for head, removed in self.plan.merge.get(layer, []):
            sinks[head] = 2 * full[head] - full[removed]
        return sinks[self.plan.heads[layer]]


def _cut_mlp(rest: str, full: Tensor, neurons: Tensor, width: int) -> Tensor:
    """Keep rows of fc1 (of the gate and of the other half) and columns of fc2, whose bias belongs to the stream."""
    if "linear_fc1" in rest:
        return full[torch.cat([neurons + width * half for half in range(full.shape[0] // width)])]
    return full.index_select(1, neurons) if rest.endswith("linear_fc2.weight") else full


class NarrowedSource:
    """A model whose residual stream is narrowed; `layers` are the teacher's numbers of the model's layers.

    Where the embedding is multiplied with ``sqrt(H)``, the table makes up for the student's smaller H, and the final
    norm for a table that is the output layer too.
    """

    def __init__(self, source: ParameterSource, teacher: Dims, layers: list[int], hidden: HiddenCut) -> None:
        self.source, self.teacher, self.layers, self.hidden = source, teacher, layers, hidden

    def tables(self, name: str) -> Iterator[Tensor]:
        """Yield embedding or output layer in blocks of rows, so that no second table is in memory, nor in float64."""
        for rows_NH in self.source(name).split(TABLE_ROWS):
            yield self._table(name, rows_NH)

    def _table(self, name: str, full_NH: Tensor) -> Tensor:
        if name == OUTPUT_LAYER:
            return self.hidden.read(FINAL_NORM, full_NH)
        table_NK = self.hidden.embed(full_NH)
        by_width = self.teacher.embedding_by_width
        return scaled(table_NK, math.sqrt(full_NH.shape[1] / table_NK.shape[1]) if by_width else 1.0)

    def __call__(self, name: str) -> Tensor:
        full, hidden, teacher = self.source(name), self.hidden, self.teacher
        if name in (EMBEDDING, OUTPUT_LAYER):
            return self._table(name, full)
        if name.startswith("decoder.final_layernorm."):
            if name.endswith("bias"):
                return hidden.norm_bias(full)
            weight_K = hidden.norm(FINAL_NORM, full)
            by_width = teacher.embedding_by_width and teacher.tied_embeddings
            factor = math.sqrt(len(weight_K) / len(full)) if by_width else 1.0
            return scaled(weight_K, factor, one_plus=teacher.norm_1p)
        layer, rest = split_name(name)
        before_attention, before_mlp = attention_norm_key(self.layers[layer]), mlp_norm_key(self.layers[layer])
        if rest in ("input_layernorm.weight", "pre_mlp_layernorm.weight"):
            return hidden.norm(before_attention if rest.startswith("input") else before_mlp, full)
        if rest in ("input_layernorm.bias", "pre_mlp_layernorm.bias"):
            return hidden.norm_bias(full)
        if rest.endswith("post_layernorm.weight"):
            writer = "self_attention.linear_proj" if rest.startswith("self_attention") else "mlp.linear_fc2"
            return hidden.post_norm(f"decoder.layers.{self.layers[layer]}.{writer}.weight", full)
        if rest in ATTENTION_READERS:
            return hidden.read(before_attention, full)
        if rest.endswith(("linear_fc1.weight", "router.weight", "gate_weight")):
            return hidden.read(before_mlp, full)
        if "linear_proj" in rest or "linear_fc2" in rest:
            return hidden.write(full)
        return full  # not of the stream: query and key norms, sinks, latents, biases of fc1, qkv and router


def split_name(name: str) -> tuple[int, str]:
    """Split the name of a parameter into layer number and rest."""
    _, _, layer, rest = name.split(".", 3)
    return int(layer), rest
