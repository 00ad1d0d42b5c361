"""What DeepSeek's models have of their own in config and files: latents, dense first layers, groups of experts."""

from __future__ import annotations

import logging
import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.rope import mscale_of

if TYPE_CHECKING:
    from torch import Tensor

LATENT_NAMES = {
    "self_attention.linear_q_proj": ["self_attn.q_proj"],
    "self_attention.linear_q_down_proj": ["self_attn.q_a_proj"],
    "self_attention.q_layernorm": ["self_attn.q_a_layernorm"],
    "self_attention.linear_q_up_proj": ["self_attn.q_b_proj"],
    "self_attention.linear_kv_down_proj": ["self_attn.kv_a_proj_with_mqa"],
    "self_attention.kv_layernorm": ["self_attn.kv_a_layernorm"],
    "self_attention.linear_kv_up_proj": ["self_attn.kv_b_proj"],
}
"""Tensor names of attention with latents: Megatron's modules -> DeepSeek's."""


FP8_BLOCK = 128
"""Rows and columns of a weight that share a scale, in files with weights in float8."""
SCALE = "_scale_inv"
"""Ends the name of a weight's scales, behind the weight's own name."""

_log = logging.getLogger(__name__)


def dims_of_deepseek(config: Any, *, sigmoid: bool) -> dict[str, Any]:
    """Return the fields of `Dims` that these families have of their own, each value checked."""
    quantised = dict(getattr(config, "quantization_config", None) or {})
    kind = (quantised.get("quant_method"), quantised.get("fmt", "e4m3"), quantised.get("weight_block_size"))
    if quantised and kind != ("fp8", "e4m3", [FP8_BLOCK, FP8_BLOCK]):
        raise CheckpointError(
            f"config.json: quantization_config={quantised} is not read, only fp8 in blocks of {FP8_BLOCK} x "
            f"{FP8_BLOCK}; give the weights in bfloat16, and delete it."
        )
    return _latents_of(config) | _dense_layers_of(config) | _routing_of(config, sigmoid=sigmoid)


def deepseek_values(dims: Dims) -> dict[str, Any]:
    """Return what a config says of these fields, where a cut can change it."""
    assert dims.dense_layers is not None
    return {
        "num_key_value_heads": dims.num_heads,
        "head_dim": dims.qk_rope_head_dim,
        "first_k_dense_replace": sum(dims.dense_layers),
        "n_shared_experts": dims.shared_expert_ffn // dims.ffn_hidden_size,
        "num_nextn_predict_layers": 0,
    }


def dequantised(weight_OI: Tensor, scale_PQ: Tensor) -> Tensor:
    """Return a weight in float8 times the scales of its blocks, float32."""
    rows, columns = weight_OI.shape
    scale_OI = scale_PQ.float().repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return weight_OI.float() * scale_OI


def is_further_layer(name: str, dims: Dims) -> bool:
    """Return whether a tensor of a file is of a layer that predicts further tokens, behind the last of the model."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return dims.family == "deepseek_v3" and layer is not None and int(layer[1]) >= dims.num_layers


@cache
def tell_of_further_layers(folder: Path, count: int) -> None:
    """Say once that these are left out."""
    _log.warning(
        "model.source=%s: %d tensors of layers that predict further tokens are not read; the student has none.",
        folder, count,
    )  # fmt: skip


def latent_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what makes queries, keys and values from latents, by name in the attention's module."""
    h, q_rank, kv_rank, heads = dims.hidden_size, dims.q_lora_rank, dims.kv_lora_rank, dims.num_heads
    of_queries: dict[str, tuple[int, ...]] = {"linear_q_proj.weight": (heads * dims.qk_head_dim, h)}
    if q_rank:
        of_queries = {
            "linear_q_down_proj.weight": (q_rank, h),
            "q_layernorm.weight": (q_rank,),
            "linear_q_up_proj.weight": (heads * dims.qk_head_dim, q_rank),
        }
    return of_queries | {
        "linear_kv_down_proj.weight": (kv_rank + dims.qk_rope_head_dim, h),
        "kv_layernorm.weight": (kv_rank,),
        "linear_kv_up_proj.weight": (heads * (dims.qk_nope_head_dim + dims.head_dim), kv_rank),
    }


_LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _latents_of(config: Any) -> dict[str, Any]:
    """Return the sizes of multi-head latent attention, and its scale, which yarn's `mscale_all_dim` changes."""
    ranks = {} if config.q_lora_rank is None else {"q_lora_rank": config.q_lora_rank}
    sizes = {name: getattr(config, name) for name in _LATENT_SIZES} | ranks
    for key, size in sizes.items():
        if type(size) is not int or size < 1 or (key == "qk_rope_head_dim" and size % 2):
            even = ", and even" if key == "qk_rope_head_dim" else ""
            raise CheckpointError(f"config.json: {key}={size!r} must be a whole number > 0{even}.")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups not in (None, heads):
        raise CheckpointError(
            f"config.json: num_key_value_heads={groups} must be num_attention_heads={heads} with latents, from which "
            "every head has keys of its own."
        )
    sizes["head_dim"] = sizes.pop("v_head_dim")
    scale = (sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]) ** -0.5 * mscale_of(config) ** 2
    return sizes | {"attention_multiplier": scale, "rotary_interleaved": getattr(config, "rope_interleave", True)}


def _dense_layers_of(config: Any) -> dict[str, Any]:
    """Return which layers have one MLP in place of experts, the first ones, and how wide it is."""
    first, width = config.first_k_dense_replace, config.intermediate_size
    for key, value in {"first_k_dense_replace": first, "intermediate_size": width}.items():
        if type(value) is not int or value < 0:
            raise CheckpointError(f"config.json: {key}={value!r} must be a whole number >= 0.")
    return {"dense_layers": [layer < first for layer in range(config.num_hidden_layers)], "dense_ffn": width}


def _routing_of(config: Any, *, sigmoid: bool) -> dict[str, Any]:
    """Return how DeepSeek's routers choose experts, and the width of the one that sees every token."""
    count, shared, scale = config.n_routed_experts, config.n_shared_experts or 0, config.routed_scaling_factor
    method = getattr(config, "topk_method", None) or "noaux_tc"
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise CheckpointError(f"config.json: routed_scaling_factor={scale!r} must be a number > 0.")
    if not sigmoid and method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(f"config.json: topk_method={method!r} must be greedy or group_limited_greedy.")
    groups, best = (1, 1) if method == "greedy" else (config.n_group or 1, config.topk_group or 1)
    for key, value in {"n_group": groups, "topk_group": best, "n_shared_experts": shared}.items():
        if type(value) is not int or value < 0:
            raise CheckpointError(f"config.json: {key}={value!r} must be a whole number >= 0.")
    of_group = count // groups
    if count % groups or best > groups or best * of_group < config.num_experts_per_tok or (sigmoid and of_group < 2):
        raise CheckpointError(
            f"config.json: n_routed_experts={count} in n_group={groups} with topk_group={best} do not fit "
            f"num_experts_per_tok={config.num_experts_per_tok}; fetch the file again."
        )
    return {
        "shared_expert_ffn": shared * config.moe_intermediate_size,
        "shared_expert_gate": False,
        "sigmoid_gates": sigmoid,
        "expert_groups": groups,
        "groups_per_token": best,
        "gate_scale": float(scale),
    }
