"""What `run_config.yaml` of a Megatron-Bridge checkpoint says of its model, and the config.json that follows from it.

The file is read as data: what its `_target_` keys name is never made. Its section `model` holds Megatron-Core's own
settings and no family, which is the first of ours that computes what they say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf_config import config_values, quick_dims
from compactlm_nemo.models.outside import refuse_absurd_sizes, refuse_large_config

RUN_CONFIG = "run_config.yaml"

LLAMA3_OF_MEGATRON = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-Core's `rope_scaling` takes beside its factor; it has no settings for them."""

SUPPORTED: dict[str, Any] = {
    "multi_latent_attention": False, "moe_layer_freq": 1, "mtp_num_layers": None, "softmax_type": "vanilla",
    "moe_router_score_function": "softmax", "qk_l2_norm": False, "attention_output_gate": False, "no_rope_freq": None,
    "window_attn_skip_freq": None, "position_embedding_type": "rope", "rotary_interleaved": False,
    "moe_latent_size": None, "moe_router_topk_scaling_factor": None, "moe_router_num_groups": None,
    "moe_router_enable_expert_bias": False, "experimental_attention_variant": None, "linear_attention_freq": None,
    "heterogeneous_block_specs": False, "is_hybrid_model": False, "softmax_scale": None, "qk_clip": False,
    "activation_func_clamp_value": None, "glu_linear_offset": 0.0, "mrope_section": None,
    "apply_residual_connection_post_layernorm": False,
}  # fmt: skip
"""Setting that changes what a model computes -> its only value here, which a missing key and null have too."""

_NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers"),
    "hidden_size": ("hidden_size", "hidden_size"),
    "ffn_hidden_size": ("intermediate_size", "ffn_hidden_size"),
    "num_heads": ("num_attention_heads", "num_attention_heads"),
    "num_query_groups": ("num_key_value_heads", "num_query_groups"),
    "head_dim": ("head_dim", "kv_channels"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "norm_eps": ("rms_norm_eps", "layernorm_epsilon"),
    "rope_theta": ("rope_theta", "rotary_base"),
    "rope_scaling": ("rope_scaling", "rope_scaling"),
    "rotary_percent": ("partial_rotary_factor", "rotary_percent"),
    "tied_embeddings": ("tie_word_embeddings", "share_embeddings_and_output_weights"),
    "qkv_bias": ("attention_bias", "add_qkv_bias"),
    "proj_bias": ("attention_bias", "add_bias_linear"),
    "mlp_bias": ("mlp_bias", "add_bias_linear"),
    "gated_mlp": ("hidden_act", "gated_linear_unit"),
    "layer_norm_1p": ("model_type", "normalization"),
    "qk_norm": ("model_type", "qk_layernorm"),
    "window": ("sliding_window", "window_size"),
    "num_experts": ("num_experts", "num_moe_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_router_topk"),
    "norm_topk": ("norm_topk_prob", "moe_router_pre_softmax"),
    "shared_expert_ffn": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
}
"""Field of `Dims` -> what config.json and what run_config.yaml call it."""


def read_model_settings(weights: Path) -> dict[str, Any] | None:
    """Return section `model` of the run_config.yaml beside a checkpoint's shards; None where there is no such file.

    Raises:
        CheckpointError: it cannot be read, or has no such section.
    """
    path = weights / RUN_CONFIG
    if not path.is_file():
        return None
    import yaml

    refuse_large_config(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is damaged ({reason}); fetch it again, or set model.hf_assets.") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise CheckpointError(f"{path} has no section `model`; fetch it again, or set model.hf_assets.")
    return dict(settings["model"])


def dims_of_settings(settings: Mapping[str, Any], where: str = RUN_CONFIG, family: str | None = None) -> Dims:
    """Return the architecture that Megatron-Core's settings of a model make, as Megatron-Bridge and NeMo 2 keep them.

    Args:
        family: The model's where it is known, else the first that has these parts.
    Raises:
        CheckpointError: a setting is missing, no number, or one that no family here computes; `where` begins the line.
    """
    for key, only in SUPPORTED.items():
        if (value := settings.get(key)) not in (None, only):
            raise CheckpointError(f"{where}: model.{key}={value!r} is not supported; it must be {only!r}.")
    get = _Numbers(settings, where)
    layer_norm, gated = settings.get("normalization") == "LayerNorm", bool(settings.get("gated_linear_unit"))
    _check_layer(settings, where, layer_norm, gated)
    experts = get.size("num_moe_experts", 0)
    hidden, heads = get.size("hidden_size"), get.size("num_attention_heads")
    has_biases = bool(settings.get("add_bias_linear"))
    dims = Dims(
        family=_family(settings, family, hidden % heads > 0),
        num_layers=get.size("num_layers"),
        hidden_size=hidden,
        ffn_hidden_size=(get.size("moe_ffn_hidden_size", 0) if experts else 0) or get.size("ffn_hidden_size"),
        num_heads=heads,
        num_query_groups=get.size("num_query_groups", heads),
        head_dim=get.size("kv_channels", hidden // heads),
        vocab_size=get.size("vocab_size"),
        max_position_embeddings=get.size("seq_length"),
        norm_eps=get.number("layernorm_epsilon", 1e-5),
        rope_theta=get.number("rotary_base", 10000.0),
        rope_scaling=_rope_scaling(settings, get),
        rotary_percent=get.number("rotary_percent", 1.0),
        tied_embeddings=bool(settings.get("share_embeddings_and_output_weights", True)),
        qkv_bias=has_biases or bool(settings.get("add_qkv_bias")),
        proj_bias=has_biases,
        mlp_bias=has_biases and not experts,
        qk_norm=bool(settings.get("qk_layernorm")),
        gated_mlp=gated,
        layer_norm_1p=layer_norm,
        window=_window(settings, where),
        num_experts=experts,
        experts_per_token=get.size("moe_router_topk", 2) if experts else 0,
        norm_topk=bool(experts) and not settings.get("moe_router_pre_softmax"),
        shared_expert_ffn=get.size("moe_shared_expert_intermediate_size", 0) if experts else 0,
    )
    refuse_absurd_sizes(config_values(dims), where)
    if quick_dims(config_values(dims)) != dims:
        raise CheckpointError(
            f"{where}: no model that is supported is what section `model` says; it must be one of "
            f"{', '.join(FAMILIES_OF_SETTINGS)}."
        )
    return dims


FAMILIES_OF_SETTINGS = ("llama", "mistral", "qwen2", "qwen3", "nemotron", "mixtral", "qwen2_moe", "qwen3_moe")
"""Families that settings of Megatron-Core alone can mean; the others have parts that it has no settings for."""


class _Numbers:
    """Settings as numbers, each checked."""

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self.settings, self.where = settings, where

    def size(self, key: str, missing: int | None = None) -> int:
        value = self.settings.get(key)
        if value is None and missing is not None:
            return missing
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{self.where}: model.{key}={value!r} must be a whole number > 0; mend it, or set model.hf_assets."
            )
        return value

    def number(self, key: str, missing: float) -> float:
        value = self.settings.get(key)
        try:
            return float(missing if value is None else value)  # YAML takes 1e-06 for a text
        except (TypeError, ValueError):
            raise CheckpointError(
                f"{self.where}: model.{key}={value!r} must be a number; mend it, or set model.hf_assets."
            ) from None


def _check_layer(settings: Mapping[str, Any], where: str, layer_norm: bool, gated: bool) -> None:
    """Refuse norms and activations that no family has."""
    if layer_norm is not bool(settings.get("layernorm_zero_centered_gamma")):
        raise CheckpointError(
            f"{where}: model.normalization={settings.get('normalization')} with layernorm_zero_centered_gamma="
            f"{bool(settings.get('layernorm_zero_centered_gamma'))} is not supported; only LayerNorm has it, and must."
        )
    activation = settings.get("activation_func")
    name = str(activation.get("_target_") if isinstance(activation, dict) else activation)
    if name.rpartition(".")[2] != ("silu" if gated else "squared_relu"):
        raise CheckpointError(
            f"{where}: model.activation_func={name} with gated_linear_unit={gated} is not supported; it must be silu "
            "with a gate, or squared_relu without."
        )


def _family(settings: Mapping[str, Any], known: str | None, has_own_head_size: bool) -> str:
    """Return the known family, or else the first that has these parts; a Llama with heads of their own is a Mistral."""
    if known is not None:
        return "mistral" if known == "llama" and has_own_head_size else known
    has_norms = bool(settings.get("qk_layernorm"))
    if settings.get("num_moe_experts"):
        shared = settings.get("moe_shared_expert_intermediate_size")
        return "qwen3_moe" if has_norms else "qwen2_moe" if shared else "mixtral"
    if settings.get("normalization") == "LayerNorm":
        return "nemotron"
    if has_norms:
        return "qwen3"
    if settings.get("add_qkv_bias") and not settings.get("add_bias_linear"):
        return "qwen2"
    return "mistral" if settings.get("window_size") or has_own_head_size else "llama"


def _rope_scaling(settings: Mapping[str, Any], get: _Numbers) -> dict[str, Any] | None:
    if settings.get("seq_len_interpolation_factor") is not None:
        return {"rope_type": "linear", "factor": get.number("seq_len_interpolation_factor", 1.0)}
    if settings.get("rope_scaling"):
        return {"rope_type": "llama3", "factor": get.number("rope_scaling_factor", 8.0)} | LLAMA3_OF_MEGATRON
    return None


def _window(settings: Mapping[str, Any], where: str) -> int | None:
    """Return how many tokens a query sees: Megatron's window is those before its own, and those after it."""
    window = settings.get("window_size")
    if window is None:
        return None
    if not isinstance(window, list) or len(window) != 2 or type(window[0]) is not int or window[1] != 0:
        raise CheckpointError(f"{where}: model.window_size={window!r} is not supported; it must be [tokens, 0].")
    return int(window[0]) + 1


def refuse_other_settings(dims: Dims, stated: Dims, hf_assets: Path, where: str) -> None:
    """Refuse a config.json that says otherwise than the checkpoint's own settings, `stated`.

    A llama may stand for the mistral that computes the same. The length that a model was trained with is not compared:
    a run sets it as it likes. Megatron-Bridge 0.3 writes `sliding_window` itself into `window_size`, newer versions
    one less, which is what it means.

    Raises:
        CheckpointError: they differ; every difference is named, with both values.
    """
    if dims.window is not None and stated.window == dims.window + 1:
        stated = replace(stated, window=dims.window)
    there, here = asdict(stated), asdict(dims)
    differing = [field for field in _NAMES if there[field] != here[field]]
    if not differing:
        return
    pairs = ", ".join(
        f"{name} {here[field]!r} but {theirs} {there[field]!r}"
        for field in differing
        for name, theirs in [_NAMES[field]]
    )
    raise CheckpointError(
        f"model.hf_assets={hf_assets} and {where} tell of different models: {pairs}; give the config.json of this "
        "model, or leave model.hf_assets out."
    )


def number_format(settings: Mapping[str, Any]) -> str:
    """Return the name of the number format that a model's settings ask for."""
    return "bfloat16" if settings.get("bf16") else "float16" if settings.get("fp16") else "float32"
