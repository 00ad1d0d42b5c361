"""Values of a Hugging Face config that need more than to be read: each is checked, and an error names it."""

from __future__ import annotations

import math
from typing import Any

from compactlm_nemo.errors import CheckpointError

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
"""Config keys that are fields of `Dims` of the same names."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""What `layer_types` says of a layer, by whether it is local."""

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")


def refuse_other_than_whole_sizes(config: Any, further: tuple[str, ...]) -> None:
    """Refuse a size that is no whole number; some versions of transformers take any value."""
    may_be_missing = ("num_key_value_heads", "head_dim", "shared_expert_intermediate_size")
    for key in (*_SIZES, *further, *may_be_missing):
        size = getattr(config, key, None)
        if type(size) is not int and not (size is None and key in may_be_missing):
            raise CheckpointError(f"config.json: {key}={size!r} must be a whole number.")


def multipliers_of(config: Any) -> dict[str, Any]:
    """Return the fields of `Dims` that `MULTIPLIERS` names."""
    values = {name: getattr(config, name) for name in MULTIPLIERS}
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise CheckpointError(f"config.json: {name}={value!r} must be a number > 0.")
    return {name: float(value) for name, value in values.items()}


def no_rope_layers_of(config: Any) -> list[bool]:
    """Return for each layer whether it has no rotary embedding; the config's list has 1 for a layer that has one."""
    num_layers, rotates = config.num_hidden_layers, config.no_rope_layers
    if rotates is None:
        rotates = [(layer + 1) % config.no_rope_layer_interval != 0 for layer in range(num_layers)]
    if len(rotates) < num_layers:
        raise CheckpointError(f"config.json: no_rope_layers has {len(rotates)} entries for {num_layers} layers.")
    return [not rotated for rotated in rotates[:num_layers]]


def local_layers_of(config: Any, every: int) -> list[bool]:
    """Return for each layer whether it is local; without a list every `sliding_window_pattern`-th is global.

    Args:
        every: Takes the place of a missing `sliding_window_pattern`.
    """
    num_layers, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)
    if kinds is None:
        patterns = [getattr(config, name, None) for name in ("_sliding_window_pattern", "sliding_window_pattern")]
        every = patterns[0] or patterns[1] or every
        kinds = [LAYER_TYPES[(layer + 1) % every != 0] for layer in range(num_layers)]
    if len(kinds) < num_layers:
        raise CheckpointError(f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers.")
    if unknown := [kind for kind in kinds if kind not in LAYER_TYPES]:
        raise CheckpointError(f"config.json: layer_types has {unknown[0]!r}; only {LAYER_TYPES} are supported.")
    local_layers = [kind == LAYER_TYPES[True] for kind in kinds[:num_layers]]
    if any(local_layers) and (type(config.sliding_window) is not int or config.sliding_window < 1):
        raise CheckpointError(
            f"config.json: sliding_window={config.sliding_window!r} must be a whole number > 0 for the layers that "
            "layer_types calls sliding_attention."
        )
    return local_layers


def query_scale_of(config: Any) -> dict[str, Any]:
    """Return the field of `Dims` for ``1 / sqrt(query_pre_attn_scalar)``."""
    scalar = config.query_pre_attn_scalar
    if type(scalar) not in (int, float) or not 0 < scalar < math.inf:
        raise CheckpointError(f"config.json: query_pre_attn_scalar={scalar!r} must be a number > 0.")
    return {"attention_multiplier": scalar**-0.5}


def count_key(config: Any) -> str:
    """Return the key of the number of experts, which not every version of transformers has under both names."""
    names = ("n_routed_experts", "num_experts")
    return next((name for name in names if getattr(config, name, None) is not None), "num_local_experts")


def experts_of(config: Any, kind: str, norm_topk: bool | None) -> dict[str, Any]:
    """Return number, choice and gates of the experts."""
    count, picked = getattr(config, count_key(config)), config.num_experts_per_tok
    if not 1 <= picked <= count:
        raise CheckpointError(f"config.json: num_experts_per_tok={picked} must be in [1, {count}], the experts.")
    if norm_topk is None:
        norm_topk = bool(config.norm_topk_prob)
    if norm_topk and picked == 1:
        raise CheckpointError(
            f"config.json: num_experts_per_tok=1 with gate weights scaled to sum to 1 is not supported for {kind}: "
            "every gate would be 1 and the router without gradient."
        )
    return {
        "num_experts": count,
        "experts_per_token": picked,
        "norm_topk": norm_topk,
        "shared_expert_ffn": getattr(config, "shared_expert_intermediate_size", None) or 0,
    }


def merged_experts_of(config: Any) -> dict[str, Any]:
    """Return what router and activation of merged experts are; their weights may be packed as MXFP4 alone."""
    packing = getattr(config, "quantization_config", None) or {}
    method = packing.get("quant_method") if isinstance(packing, dict) else packing.quant_method
    if packing and method != "mxfp4":
        raise CheckpointError(
            f"config.json: quantization_config.quant_method={method!r} is not read, only 'mxfp4'; let transformers "
            "dequantise the model, and save it."
        )
    limit = getattr(config, "swiglu_limit", 7.0)
    if type(limit) not in (int, float) or not 0 < limit < math.inf:
        raise CheckpointError(f"config.json: swiglu_limit={limit!r} must be a number > 0.")
    return {"router_bias": True, "swiglu_limit": float(limit)}


def refuse_other_value(kind: str, key: str, value: Any, supported: Any) -> None:
    """Refuse a key of the config that has another value than the supported one."""
    if value != supported:
        raise CheckpointError(f"config.json: {key}={value!r} is not supported for {kind}; it must be {supported!r}.")
