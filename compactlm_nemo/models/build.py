"""An architecture's integers -> Megatron-Core's GPTModel on the present mesh, and its filling with weights."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from compactlm_nemo.config.distill import Recompute
from compactlm_nemo.data.marks import ids_of
from compactlm_nemo.losses.vocabulary import Head
from compactlm_nemo.losses.vocabulary import chunk_tokens as tokens_that_fit
from compactlm_nemo.models.attention import AttentionMask
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.experts import add_bias
from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER
from compactlm_nemo.models.layout import split_layers
from compactlm_nemo.models.megatron_config import transformer_config
from compactlm_nemo.models.rope import inverse_frequencies
from compactlm_nemo.models.router import GroupRouter, has_own_routing
from compactlm_nemo.models.spec import block_spec
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.mesh import Mesh

ParameterSource = Callable[[str], Tensor]
"""Megatron name with global layer and expert numbers -> the whole unpadded parameter on the CPU."""

TableSource = Callable[[str], Iterator[Tensor]]
"""Name of the embedding or the output layer -> its unpadded rows, block after block, on the CPU."""


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage returns its final normed hidden states `[s, b, h]`, whole under sequence parallelism.

    The output layer is applied by the chunked loss heads, so that the logits of a sequence never exist at once. Where a
    model divides its logits, its hidden states are divided here instead, and no head needs to know.
    """

    logits_scaling: float = 1.0
    """What the hidden states are divided by, `Dims.logits_scaling`."""

    document_end: int | None = None
    """Token at which a document begins and attention with it, as it ends the one before; None: samples are whole."""

    rotations: tuple[int, Tensor, Tensor] | None = None
    """A length, and the rotary frequencies of sequences up to it and of longer ones, where these differ."""

    is_decoding: bool = False
    """Whether places are rows of text that grow (`decoding.Decoding`), which brings masks and angles of its own."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: None = None, **others: Any) -> Any:
        """Run `input_ids` `[b, s]`, with or without marks (`data.marks`), of this context-parallel rank.

        The attention mask is made here, once for all layers.
        """
        input_ids = ids_of(input_ids)
        if self.is_decoding:
            return super().forward(input_ids, position_ids, None, **others)
        mask = self.attention_mask(input_ids, self.document_end)
        if self.rotations is not None:  # Megatron keeps the angles of each length
            limit, short, long = self.rotations
            is_long = input_ids.shape[1] * self.config.context_parallel_size > limit
            self.rotary_pos_emb.inv_freq = long if is_long else short
        return super().forward(input_ids, position_ids, mask, **others)

    @cached_property
    def attention_mask(self) -> AttentionMask:
        return AttentionMask(self.config, self.cp_group)

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        if self.post_process and self.logits_scaling != 1:
            hidden_states = hidden_states / self.logits_scaling
        if self.post_process and self.config.sequence_parallel:
            # The loss heads sum their gradient over TP ranks themselves, so each rank takes its own part of it.
            return gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """`[V / tp, H]`: this rank's rows of the output layer. Last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class ModelChunks(list[Any]):
    """The parts of the model that one rank holds, in pipeline order: one, or `parallel.virtual_stages`.

    A list, because Megatron's schedules, optimizer and checkpoints take one. Its members are `HiddenStateModel`s, or
    what stands around each of them (`wrapped`) with the chunk as `module`.
    """

    def __init__(self, chunks: Iterable[Any], dims: Dims, mesh: Mesh, chunk_tokens: int) -> None:
        super().__init__(chunks)
        self.dims, self.mesh, self.chunk_tokens = dims, mesh, chunk_tokens

    def wrapped(self, wrappers: Iterable[Any]) -> ModelChunks:
        """Return the same model with something around each chunk, in the chunks' order."""
        return ModelChunks(wrappers, self.dims, self.mesh, self.chunk_tokens)

    def plain(self) -> list[HiddenStateModel]:
        """Return the chunks without what stands around them."""
        return [getattr(chunk, "module", chunk) for chunk in self]

    def train(self, mode: bool = True) -> ModelChunks:
        for chunk in self:
            chunk.train(mode)
        return self

    def eval(self) -> ModelChunks:
        return self.train(False)

    @property
    def head_weight(self) -> Tensor:
        """`[V / tp, H]`: this rank's rows of the output layer. Last stage only."""
        return self.plain()[-1].head_weight

    def head(self) -> Head:
        """Return this rank's part of the output layer, for the losses. Last stage only."""
        return Head.on_mesh(
            self.head_weight, self.mesh, vocab_size=self.dims.vocab_size, chunk_tokens=self.chunk_tokens
        )

    def layers(self) -> Iterator[Any]:
        """Return this rank's decoder layers in model order; `layer_number - 1` is the global 0-based index."""
        for chunk in self.plain():
            yield from chunk.decoder.layers

    def parameters(self) -> Iterator[Tensor]:
        for chunk in self:
            yield from chunk.parameters()


def recompute_activations(chunks: ModelChunks, how: Recompute) -> None:
    """Make training keep less of its forward pass, and run a part of it again in backward.

    `Recompute.full`: of each layer the input is kept. `Recompute.selective`: of each layer's MLP, or experts with their
    router and messages, the input is kept; Megatron's granularity of that name with the modules `mlp` and `moe`. Its
    `core_attn` is left out: a fused kernel keeps no scores, and without what it keeps a layer has 0.05 % less (Llama
    3.1 8B, 8,192 tokens, by the plan's meter). So is `layernorm`, which asks for Transformer Engine.
    """
    if how is Recompute.full:
        for chunk in chunks:
            chunk.config.recompute_granularity, chunk.config.recompute_method = "full", "uniform"
            chunk.config.recompute_num_layers = 1
    elif how is Recompute.selective:
        # Megatron reads its config when it builds a layer, before anybody knows whether the model will be trained.
        for layer in chunks.layers():
            part, switch = (layer.mlp, "moe_layer_recompute") if layer.is_moe_layer else (layer, "recompute_mlp")
            assert getattr(part, switch) is False
            setattr(part, switch, True)


def build_model(
    dims: Dims, mesh: Mesh, *, dtype: torch.dtype, vocab_multiple: int, chunk_tokens: int | None = None
) -> ModelChunks:
    """Return this rank's share of the model, weights not yet meaningful: use `fill` or a checkpoint.

    `chunk_tokens` are the tokens whose logits exist at the same time; None takes what `tokens_that_fit` says.
    """
    config = transformer_config(dims, mesh, dtype)
    counts = split_layers(dims.num_layers, mesh.layout)
    stages = mesh.layout.virtual_stages
    if chunk_tokens is None:
        rows = dims.padded_vocab(mesh.tp_size, vocab_multiple) // mesh.tp_size
        chunk_tokens = tokens_that_fit(None, rows, dims.hidden_size, dtype=dtype, device=device())
    chunks = (
        _build_chunk(
            dims,
            mesh,
            config,
            layers=_layers_of(counts, stage * mesh.pp_size + mesh.pp_rank),
            vocab_multiple=vocab_multiple,
            is_first=mesh.is_first_stage and stage == 0,
            is_last=mesh.is_last_stage and stage == stages - 1,
            vp_stage=stage if stages > 1 else None,
        )
        for stage in range(stages)
    )
    return ModelChunks(chunks, dims, mesh, chunk_tokens)


def _layers_of(counts: list[int], chunk: int) -> range:
    """Return the numbers of a chunk's layers; `counts` are those of all chunks in pipeline order."""
    first = sum(counts[:chunk])
    return range(first, first + counts[chunk])


def _build_chunk(
    dims: Dims,
    mesh: Mesh,
    config: TransformerConfig,
    *,
    layers: range,
    vocab_multiple: int,
    is_first: bool,
    is_last: bool,
    vp_stage: int | None,
) -> HiddenStateModel:
    model = HiddenStateModel(
        config=config,
        transformer_layer_spec=block_spec(dims, layers),
        vocab_size=dims.padded_vocab(mesh.tp_size, vocab_multiple),
        max_sequence_length=dims.max_position_embeddings,
        pre_process=is_first,
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=dims.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=dims.rotary_percent,
        rotary_base=int(dims.rope_theta),
        vp_stage=vp_stage,
    )
    if dims.router_bias:
        for layer in model.decoder.layers:
            add_bias(layer.mlp.router)
    for module in model.modules():
        # Megatron marks shards while it initialises them, which we skip; unmarked, the gradient norm drops those of
        # every TP rank but the first.
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            if module.weight is not None:  # None: a tied output layer on the stage of the embedding
                module.weight.tensor_model_parallel = True
    _set_rotations(model, dims)
    _set_routers(model, dims)
    model.logits_scaling = dims.logits_scaling
    if is_first and (scale := embedding_scale(dims, config.params_dtype)) != 1:
        model.embedding.register_forward_hook(lambda _, args, stream: stream * scale)
    return model.to(device())


def embedding_scale(dims: Dims, dtype: torch.dtype) -> float:
    """Return what rows of the embedding table are multiplied with where they enter the stream."""
    by_width = torch.tensor(math.sqrt(dims.hidden_size), dtype=dtype).item() if dims.embedding_by_width else 1.0
    return dims.embedding_multiplier * by_width


def _set_rotations(model: HiddenStateModel, dims: Dims) -> None:
    """Give a chunk its rotary frequencies, which Megatron's own settings cannot express, on its device."""
    rotary = model.rotary_pos_emb
    rotary.inv_freq = inverse_frequencies(dims).to(rotary.inv_freq.device)
    if dims.rope_scaling is not None and dims.rope_scaling["rope_type"] == "longrope":
        limit = dims.rope_scaling["original_max_position_embeddings"]
        model.rotations = limit, rotary.inv_freq, inverse_frequencies(dims, limit + 1).to(rotary.inv_freq.device)
    if dims.local_layers is not None and dims.local_rope_theta is not None:
        of_local = copy.copy(rotary)
        unscaled = replace(dims, rope_theta=dims.local_rope_theta, rope_scaling=None)
        of_local.inv_freq = inverse_frequencies(unscaled).to(rotary.inv_freq.device)
        rotary.register_forward_hook(
            lambda _, args, kwargs, angles: torch.stack([angles, of_local.forward(*args, **kwargs)]), with_kwargs=True
        )


def _set_routers(model: HiddenStateModel, dims: Dims) -> None:
    """Give layers with experts their router where it is not Megatron's, whose oldest version takes none of ours."""
    for layer in model.decoder.layers if has_own_routing(dims) else []:
        if (router := getattr(layer.mlp, "router", None)) is not None:
            layer.mlp.router = GroupRouter(router, dims)


def global_names(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Return parameters of this rank under their names in the whole model (0-based global layer and expert numbers)."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
            if match:
                layer: Any = chunk.decoder.layers[int(match[1])]  # type: ignore[union-attr,index]
                name = f"decoder.layers.{layer.layer_number - 1}.{match[2]}"
                if expert := re.match(r"(.*\.local_experts\.)(\d+)(.*)", name):
                    name = f"{expert[1]}{layer.mlp.local_expert_indices[int(expert[2])]}{expert[3]}"
            yield name, parameter


_BY_ROWS = (
    "query_norm.weight", "key_norm.weight", "linear_q_proj.weight", "linear_q_up_proj.weight",
    "linear_kv_up_proj.weight", "softmax_offset",
)  # fmt: skip
"""Further parameters whose rows, or channels, are those of heads one after another."""


def tp_share(name: str, full: Tensor, *, rank: int, size: int, gated: bool, padded_vocab: int) -> Tensor:
    """Return this TP rank's part of a whole parameter, as Megatron's parallel layers expect it."""
    if name in (EMBEDDING, OUTPUT_LAYER):
        rows = padded_vocab // size
        share = full[rank * rows : (rank + 1) * rows]
        return F.pad(share, (0, 0, 0, rows - share.shape[0])) if share.shape[0] < rows else share
    if size == 1:
        return full
    if ".linear_fc1." in name and gated:
        return torch.cat([half.chunk(size, 0)[rank] for half in full.chunk(2, 0)])
    if name.endswith(_BY_ROWS) or ".linear_qkv." in name or ".linear_fc1." in name:
        return full.chunk(size, 0)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return full.chunk(size, 1)[rank]
    return full


@torch.no_grad()
def fill(
    chunks: ModelChunks, source: ParameterSource, vocab_multiple: int, tables: TableSource | None = None
) -> None:  # fmt: skip
    """Copy this rank's share of every parameter from a source, one whole parameter in memory at a time.

    Args:
        tables: Gives embedding and output layer in the source's place, as blocks of rows.
    """
    dims, mesh = chunks.dims, chunks.mesh
    padded = dims.padded_vocab(mesh.tp_size, vocab_multiple)
    for name, parameter in global_names(chunks):
        if name == OUTPUT_LAYER and dims.tied_embeddings:
            name = EMBEDDING
        if tables is not None and name in (EMBEDDING, OUTPUT_LAYER):
            _fill_rows(parameter, tables(name), first=mesh.tp_rank * len(parameter))
            continue
        share = tp_share(
            name, source(name), rank=mesh.tp_rank, size=mesh.tp_size, gated=dims.gated_mlp, padded_vocab=padded
        )
        parameter.copy_(share)


def _fill_rows(shard_VH: Tensor, blocks: Iterator[Tensor], first: int) -> None:
    """Copy the rows from `first` on that a shard has, out of blocks of all rows; rows beyond the last are zero."""
    shard_VH.zero_()
    start = -first
    for rows_NH in blocks:
        begin, end = max(start, 0), min(start + len(rows_NH), len(shard_VH))
        if begin < end:
            shard_VH[begin:end].copy_(rows_NH[begin - start : end - start])
        start += len(rows_NH)
