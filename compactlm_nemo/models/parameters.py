"""The parameters of a model: their names in Megatron, which are ours, and their shapes."""

from __future__ import annotations

from compactlm_nemo.models.deepseek import latent_shapes
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import AFTER_ATTENTION, AFTER_MLP, EMBEDDING, OUTPUT_LAYER


def parameter_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Return the shapes of whole unpadded parameters by Megatron name (global layer and expert numbers), in order."""
    h = dims.hidden_size
    norm: dict[str, tuple[int, ...]] = {"weight": (h,), "bias": (h,)} if dims.layer_norm_1p else {"weight": (h,)}
    layer: dict[str, tuple[int, ...]] = {}
    if dims.norm_before:
        layer |= {f"input_layernorm.{k}": s for k, s in norm.items()}
    layer |= {f"self_attention.{k}": s for k, s in _attention_shapes(dims).items()}
    if dims.norm_before:
        layer |= {f"pre_mlp_layernorm.{k}": s for k, s in norm.items()}
    if dims.norm_after:
        layer |= {f"{name}.{k}": s for name in (AFTER_ATTENTION, AFTER_MLP) for k, s in norm.items()}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (dims.vocab_size, h)}
    for i in range(dims.num_layers):
        shapes |= {f"decoder.layers.{i}.{k}": s for k, s in (layer | _mlp_shapes(dims.of_layer(i))).items()}
    shapes |= {f"decoder.final_layernorm.{k}": s for k, s in norm.items()}
    if not dims.tied_embeddings:
        shapes[OUTPUT_LAYER] = (dims.vocab_size, h)
    return shapes


def _attention_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Return the attention of a layer; names as in `parameter_shapes` after the module's."""
    h, d = dims.hidden_size, dims.head_dim
    proj: dict[str, tuple[int, ...]] = {"linear_proj.weight": (h, dims.num_heads * d)}
    if dims.kv_lora_rank:
        return latent_shapes(dims) | proj
    qkv = (dims.num_heads + 2 * dims.num_query_groups) * d
    shapes: dict[str, tuple[int, ...]] = {"linear_qkv.weight": (qkv, h)}
    if dims.qkv_bias:
        shapes["linear_qkv.bias"] = (qkv,)
    if dims.attention_sinks:
        shapes["core_attention.softmax_offset"] = (dims.num_heads,)
    shapes |= proj
    if dims.proj_bias:
        shapes["linear_proj.bias"] = (h,)
    if dims.qk_norm:
        shapes |= {"q_layernorm.weight": (d,), "k_layernorm.weight": (d,)}
    if dims.qk_norm_over_heads:
        counts = {"query": dims.num_heads, "key": dims.num_query_groups}
        shapes |= {f"{of}_norm.weight": (count * d,) for of, count in counts.items()}
    return shapes


def _mlp_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Return the MLP of a layer, or its router and experts; names as in `parameter_shapes` after the layer's."""
    h, halves = dims.hidden_size, 2 if dims.gated_mlp else 1

    def matrices(prefix: str, ffn: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}linear_fc1.weight": (halves * ffn, h)}
        shapes[f"{prefix}linear_fc2.weight"] = (h, ffn)
        biases = {f"{prefix}linear_fc1.bias": (halves * ffn,), f"{prefix}linear_fc2.bias": (h,)}
        return shapes | (biases if dims.mlp_bias else {})

    if not dims.num_experts:
        return matrices("mlp.", dims.ffn_hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"mlp.router.weight": (dims.num_experts, h)}
    if dims.router_bias:
        shapes["mlp.router.bias"] = (dims.num_experts,)
    if dims.sigmoid_gates:
        shapes["mlp.router.expert_bias"] = (dims.num_experts,)
    for expert in range(dims.num_experts):
        shapes |= matrices(f"mlp.experts.local_experts.{expert}.", dims.ffn_hidden_size)
    if dims.shared_expert_ffn:
        if dims.shared_expert_gate:
            shapes["mlp.shared_experts.gate_weight"] = (1, h)
        shapes |= matrices("mlp.shared_experts.", dims.shared_expert_ffn)
    return shapes
