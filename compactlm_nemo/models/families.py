"""One table a family: what a Hugging Face config means, and which HF tensors make up a Megatron parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.dims import Dims


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one Hugging Face architecture apart from the common decoder."""

    activation: str
    """Required `hidden_act`."""
    gated_mlp: bool = True
    layer_norm_1p: bool = False
    qk_norm: bool = False
    qkv_bias: bool | None = None
    """Fixed by the architecture, or None when `attention_bias` decides."""
    mlp_bias: bool = False
    """Whether the architecture has the setting `mlp_bias`; the others have no such bias."""
    partial_rotary: bool = False
    """Whether the architecture can rotate only a part of each head."""
    norm_eps: str = "rms_norm_eps"
    """Config key of the norm's epsilon."""
    window: bool = False
    """Whether `sliding_window` applies to all layers by itself (Mistral): a query sees `window` tokens up to its own.
    Elsewhere `sliding_window` means nothing without `use_sliding_window`."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """Further config keys of this family with the only values we support."""


FAMILIES: dict[str, Family] = {
    "llama": Family(activation="silu", mlp_bias=True),
    "mistral": Family(activation="silu", qkv_bias=False, window=True),
    "qwen2": Family(activation="silu", qkv_bias=True, also={"use_sliding_window": False}),
    "qwen3": Family(activation="silu", qk_norm=True, also={"use_sliding_window": False}),
    "nemotron": Family(
        activation="relu2", gated_mlp=False, layer_norm_1p=True, norm_eps="norm_eps", mlp_bias=True, partial_rotary=True
    ),
}

_READ = {
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "hidden_act", "sliding_window", "use_sliding_window", "layer_types",
}  # fmt: skip
_HARMLESS = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "_name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "attention_dropout", "hidden_dropout",
    "max_window_layers", "pretraining_tp", "name_or_path", "output_attentions", "return_dict", "_attn_implementation",
    "is_llama_config", "transformers.js_config",
}  # fmt: skip
"""Keys without influence on the forward pass in evaluation, or that only describe the file."""


def dims_of(config: Any) -> Dims:
    """The architecture of a transformers config; a CheckpointError names the first thing we cannot represent."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise CheckpointError(f"config.json: model_type={kind} is not supported; use one of {', '.join(FAMILIES)}.")
    family = FAMILIES[kind]
    given = config.to_diff_dict()
    for key, value in given.items():
        if key not in _READ | _HARMLESS and value not in (None, False):
            raise CheckpointError(f"config.json: {key}={value!r} is not supported for model_type={kind}.")
    _only(kind, "hidden_act", config.hidden_act, family.activation)
    for key, value in family.also.items():
        _only(kind, key, getattr(config, key, value), value)
    window = getattr(config, "sliding_window", None) if family.window else None
    for layer_type in getattr(config, "layer_types", None) or []:
        _only(kind, "layer_types", layer_type, "full_attention" if window is None else "sliding_attention")
    attention_bias = bool(getattr(config, "attention_bias", False))
    mlp_bias = family.mlp_bias and bool(getattr(config, "mlp_bias", False))
    rope = _rope(config, kind)
    return Dims(
        family=kind,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=getattr(config, family.norm_eps),
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        proj_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        gated_mlp=family.gated_mlp,
        layer_norm_1p=family.layer_norm_1p,
        window=window,
        **rope,
    )


def _only(kind: str, key: str, value: Any, supported: Any) -> None:
    if value != supported:
        raise CheckpointError(f"config.json: {key}={value!r} is not supported for {kind}; it must be {supported!r}.")


def _rope(config: Any, kind: str) -> dict[str, Any]:
    """theta, scaling and rotary share from either spelling (`rope_parameters`, or the older keys)."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    old = getattr(config, "rope_scaling", None)
    if not parameters and old:
        parameters = dict(old)
    theta = parameters.pop("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0
    percent = parameters.pop("partial_rotary_factor", None) or getattr(config, "partial_rotary_factor", None) or 1.0
    if not FAMILIES[kind].partial_rotary:
        _only(kind, "partial_rotary_factor", float(percent), 1.0)
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    if rope_type not in ("default", "llama3"):
        raise CheckpointError(
            f"config.json: rope_type={rope_type!r} is not supported for {kind}; use default or llama3."
        )
    return {
        "rope_theta": float(theta),
        "rotary_percent": float(percent),
        "rope_scaling": parameters if rope_type == "llama3" else None,
    }


def resized(config: Any, dims: Dims) -> Any:
    """A copy of a transformers config with the sizes of `dims`."""
    values = config.to_dict()
    values.update(
        num_hidden_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        intermediate_size=dims.ffn_hidden_size,
        num_attention_heads=dims.num_heads,
        num_key_value_heads=dims.num_query_groups,
        head_dim=dims.head_dim,
    )
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: dims.num_layers]
    if "max_window_layers" in values:
        values["max_window_layers"] = dims.num_layers
    return type(config).from_dict(values)


def hf_names(name: str, dims: Dims) -> list[str]:
    """HF tensors that, put together along dim 0 (qkv by `merge_qkv`), are the Megatron parameter `name`.

    Layer numbers are global and 0-based.
    """
    if name == "embedding.word_embeddings.weight":
        return ["model.embed_tokens.weight"]
    if name == "output_layer.weight":
        return ["lm_head.weight"]
    if name.startswith("decoder.final_layernorm."):
        return ["model.norm." + name.rsplit(".", 1)[1]]
    _, _, layer, *middle, kind = name.split(".")
    parts = {
        "input_layernorm": ["input_layernorm"],
        "self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attention.linear_proj": ["self_attn.o_proj"],
        "self_attention.q_layernorm": ["self_attn.q_norm"],
        "self_attention.k_layernorm": ["self_attn.k_norm"],
        "pre_mlp_layernorm": ["post_attention_layernorm"],
        "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"] if dims.gated_mlp else ["mlp.up_proj"],
        "mlp.linear_fc2": ["mlp.down_proj"],
    }[".".join(middle)]
    return [f"model.layers.{layer}.{part}.{kind}" for part in parts]


def hf_shapes(name: str, wanted: tuple[int, ...], dims: Dims) -> list[tuple[int, ...]]:
    """Shapes of the tensors of `hf_names`, in their order; `wanted` is the shape of the whole Megatron parameter."""
    if "linear_qkv" in name:
        rows = [heads * dims.head_dim for heads in (dims.num_heads, dims.num_query_groups, dims.num_query_groups)]
    else:
        parts = len(hf_names(name, dims))
        rows = [wanted[0] // parts] * parts
    return [(count, *wanted[1:]) for count in rows]


def parameter_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Megatron name (global layer numbers) -> shape of the whole unpadded parameter, in model order."""
    h, f, d = dims.hidden_size, dims.ffn_hidden_size, dims.head_dim
    qkv, fc1 = (dims.num_heads + 2 * dims.num_query_groups) * d, f * (2 if dims.gated_mlp else 1)
    norm: dict[str, tuple[int, ...]] = {"weight": (h,), "bias": (h,)} if dims.layer_norm_1p else {"weight": (h,)}
    layer: dict[str, tuple[int, ...]] = {f"input_layernorm.{k}": s for k, s in norm.items()}
    layer["self_attention.linear_qkv.weight"] = (qkv, h)
    if dims.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (qkv,)
    layer["self_attention.linear_proj.weight"] = (h, dims.num_heads * d)
    if dims.proj_bias:
        layer["self_attention.linear_proj.bias"] = (h,)
    if dims.qk_norm:
        layer |= {"self_attention.q_layernorm.weight": (d,), "self_attention.k_layernorm.weight": (d,)}
    layer |= {f"pre_mlp_layernorm.{k}": s for k, s in norm.items()}
    layer |= {"mlp.linear_fc1.weight": (fc1, h), "mlp.linear_fc2.weight": (h, f)}
    if dims.mlp_bias:
        layer |= {"mlp.linear_fc1.bias": (fc1,), "mlp.linear_fc2.bias": (h,)}
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (dims.vocab_size, h)}
    for i in range(dims.num_layers):
        shapes |= {f"decoder.layers.{i}.{k}": s for k, s in layer.items()}
    shapes |= {f"decoder.final_layernorm.{k}": s for k, s in norm.items()}
    if not dims.tied_embeddings:
        shapes["output_layer.weight"] = (dims.vocab_size, h)
    return shapes
