"""Keys of a config.json that are notes of the tools which wrote it, and have no effect on the model."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.config_values import MULTIPLIERS

MOST = 64
"""Unknown keys of a file that is read at all."""

_log = logging.getLogger(__name__)


_READ = {
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "hidden_act", "sliding_window", "use_sliding_window", "layer_types",
    "original_max_position_embeddings",
}  # fmt: skip
_READ_WITH_EXPERTS = {
    "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size",
    "shared_expert_intermediate_size", "qkv_bias", "mlp_only_layers", "decoder_sparse_step",
    # Of training, or about what else is returned:
    "router_aux_loss_coef", "router_jitter_noise", "output_router_logits",
}  # fmt: skip
_READ_OF_LOCAL_LAYERS = {
    "query_pre_attn_scalar", "hidden_activation", "sliding_window_pattern", "_sliding_window_pattern",
    "rope_local_base_freq",
    "cache_implementation",  # of generation
}  # fmt: skip
_READ_WITH_LATENTS = {
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim",
    "rope_interleave", "first_k_dense_replace", "moe_layer_freq", "n_routed_experts", "n_shared_experts", "n_group",
    "topk_group", "topk_method", "scoring_func", "routed_scaling_factor",
    "quantization_config",
    # Layers that predict further tokens, which are not read; of training, or of a layout:
    "num_nextn_predict_layers", "num_mtp_layers", "aux_loss_alpha", "seq_aux", "ep_size",
}  # fmt: skip
_READ_WITH_MERGED_EXPERTS = {
    "swiglu_alpha", "swiglu_limit", "quantization_config",
    # Of OpenAI's own code, beside what transformers reads:
    "experts_per_token", "initial_context_length",
}  # fmt: skip
_HARMLESS = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "_name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "attention_dropout", "hidden_dropout",
    "max_window_layers", "pretraining_tp", "name_or_path", "output_attentions", "return_dict", "_attn_implementation",
    "is_llama_config", "transformers.js_config", "embd_pdrop", "resid_pdrop",
}  # fmt: skip
"""Keys without influence on the forward pass in evaluation, or that only describe the file."""


def known_keys(
    *, experts: bool, local_layers: bool, skips_rope: bool, multipliers: bool, latents: bool, merged_experts: bool
) -> set[str]:
    """Return the keys of a config whose meaning is known, for a family with or without each of these parts."""
    known = _READ | _HARMLESS
    known |= _READ_WITH_EXPERTS if experts else set()
    known |= _READ_WITH_LATENTS if latents else set()
    known |= _READ_OF_LOCAL_LAYERS if local_layers else set()
    known |= _READ_WITH_MERGED_EXPERTS if merged_experts else set()
    known |= {"no_rope_layers", "no_rope_layer_interval"} if skips_rope else set()
    return known | (set(MULTIPLIERS) if multipliers else set())


def refuse_unknown_keys(keys: Mapping[str, Any], kind: str) -> None:
    """Let keys pass that no model of transformers reads (`unsloth_version`), once with a line, and refuse the others.

    Raises:
        CheckpointError: some model's code reads a key (`logit_scale`), so it may have an effect that would be missing.
    """
    if not keys:
        return
    if len(keys) > MOST:
        raise CheckpointError(f"config.json: {len(keys)} keys are not known for model_type={kind}; give a real config.")
    if "auto_map" in keys:
        raise CheckpointError(
            f"config.json: auto_map names code of the folder's own, which is never run; delete it if this is a {kind}."
        )
    names = tuple(sorted(keys))
    for key in names:
        if key in _read_by_models(names):
            raise CheckpointError(f"config.json: {key}={keys[key]!r} is not supported for model_type={kind}.")
    _tell(names)


@cache
def _read_by_models(keys: tuple[str, ...]) -> frozenset[str]:
    """Return which of the keys the installed transformers reads from a config, in any of its models."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    patterns = {key: re.compile(rf"config\.{re.escape(key)}\b|[\"']{re.escape(key)}[\"']") for key in keys}
    read: set[str] = set()
    for path in [*root.glob("models/*/modeling_*.py"), root / "modeling_utils.py", root / "modeling_rope_utils.py"]:
        text = path.read_text(encoding="utf-8")
        read |= {key for key, pattern in patterns.items() if key not in read and key in text and pattern.search(text)}
    return frozenset(read)


@cache
def _tell(keys: tuple[str, ...]) -> None:
    _log.warning("config.json: no model reads %s; notes of other tools have no effect.", ", ".join(keys))
