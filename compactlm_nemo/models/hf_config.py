"""A Hugging Face config, read as the JSON that it is: the architecture without importing transformers.

Settings are checked against the architecture before anything heavy is imported, so that a mistake is answered at once.
`quick_dims` answers only where it is certain; transformers reads the same file again before any work begins
(`models.source`), and its word counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compactlm_nemo.errors import CompactLMError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import FAMILIES, dims_of
from compactlm_nemo.models.outside import refuse_absurd_sizes, refuse_large_config

_COMMON: dict[str, Any] = {
    "hidden_act": "silu", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": None, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False, "vocab_size": 32000,
}  # fmt: skip
_QWEN = _COMMON | {"vocab_size": 151936, "use_sliding_window": False, "sliding_window": None}
_QWEN_MOE = _QWEN | {
    "hidden_size": 2048, "num_hidden_layers": 24, "norm_topk_prob": False, "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}  # fmt: skip
_GLM = _COMMON | {
    "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40, "num_key_value_heads": 2,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-7, "attention_bias": True,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
_DEEPSEEK = _COMMON | {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"intermediate_size": 11008, "max_position_embeddings": 2048, "mlp_bias": False},
    "mistral": _COMMON
    | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "qwen2": _QWEN | {"intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": _QWEN | {"intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
    "smollm3": _COMMON
    | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "rope_theta": 2e6, "mlp_bias": False,
        "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None, "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    "nemotron": _COMMON
    | {
        "hidden_act": "relu2", "hidden_size": 6144, "num_attention_heads": 48, "intermediate_size": 24576,
        "max_position_embeddings": 4096, "norm_eps": 1e-5, "mlp_bias": False, "vocab_size": 256000,
        "partial_rotary_factor": 0.5,
    },
    "phi3": _COMMON
    | {
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "vocab_size": 32064, "sliding_window": None, "original_max_position_embeddings": 4096,
    },
    "granite": _COMMON
    | {
        "intermediate_size": 11008, "max_position_embeddings": 2048, "mlp_bias": False, "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0,
    },
    "olmo2": _COMMON
    | {
        "vocab_size": 50304, "intermediate_size": 11008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    },
    "gemma3_text": _COMMON
    | {
        "hidden_activation": "gelu_pytorch_tanh", "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "rope_theta": 1e6,
    },
    "glm": _GLM,
    "glm4": _GLM,
    "mixtral": _COMMON
    | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen2_moe": _QWEN_MOE
    | {
        "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408, "qkv_bias": True,
        "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
    },
    "qwen3_moe": _QWEN_MOE
    | {
        "num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "deepseek_v2": _DEEPSEEK
    | {
        "vocab_size": 102400, "intermediate_size": 11008, "max_position_embeddings": 2048, "first_k_dense_replace": 0,
        "n_group": None, "topk_group": None, "topk_method": "greedy", "n_routed_experts": 64, "n_shared_experts": 2,
        "routed_scaling_factor": 1.0, "norm_topk_prob": False, "moe_intermediate_size": 1407, "mlp_bias": False,
    },
    "deepseek_v3": _DEEPSEEK
    | {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "max_position_embeddings": 4096, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
        "n_routed_experts": 256, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "num_experts_per_tok": 8, "rope_interleave": True,
    },
    "gpt_oss": _COMMON
    | {
        "num_hidden_layers": 36, "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 128, "num_experts_per_tok": 4,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 128,
        "attention_bias": True,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip
"""Family -> the values that transformers gives what a config leaves out (a test compares them)."""


def with_own_head_size(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Llama whose heads do not divide its width (1792 and 24 heads of 128) as the Mistral that it is.

    transformers refuses such a Llama, and its Mistral is the same computation without that rule and without biases.
    Every other config is returned as it is.
    """
    whole = dict(values)
    sizes = [whole.get(key, DEFAULTS["llama"].get(key)) for key in ("hidden_size", "num_attention_heads")]
    if whole.get("model_type") != "llama" or not whole.get("head_dim") or not all(type(size) is int for size in sizes):
        return whole
    hidden, heads = sizes
    if not heads or hidden % heads == 0 or whole.get("attention_bias") or whole.get("mlp_bias"):
        return whole
    of_llama_alone = {"attention_bias", "mlp_bias", "pretraining_tp", "sliding_window"}
    plain = {key: value for key, value in (DEFAULTS["llama"] | whole).items() if key not in of_llama_alone}
    return plain | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


class _Config:
    """The values of a config as attributes, as `families.dims_of` reads them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._given = dict(values)
        rope = values.get("rope_parameters")
        said = {"rope_theta", "partial_rotary_factor", "full_attention"}
        if rope is not None and not said & rope.keys():
            raise ValueError("transformers completes these")
        defaults = DEFAULTS[values["model_type"]]
        # To transformers no scaling is a scaling that is left out.
        told = {key: value for key, value in self._given.items() if key != "rope_scaling" or value is not None}
        self.__dict__.update(defaults | told)
        if "num_local_experts" in self.__dict__:
            self.num_experts = self.num_local_experts

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def to_diff_dict(self) -> dict[str, Any]:
        return self._given


def quick_dims(values: Any) -> Dims | None:
    """Return the architecture of a config's values; None where transformers has to decide or to complain."""
    if not isinstance(values, Mapping) or values.get("model_type") not in FAMILIES:
        return None
    refuse_absurd_sizes(values, "config.json")
    try:
        return dims_of(_Config(with_own_head_size(values)))
    except (CompactLMError, AttributeError, TypeError, ValueError, ArithmeticError):
        return None


def quick_folder_dims(folder: Path) -> Dims | None:
    """Return the architecture of a Hugging Face folder, as `quick_dims`."""
    try:
        refuse_large_config(folder / "config.json")
        return quick_dims(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError):
        return None


def config_values(dims: Dims) -> dict[str, Any]:
    """Return what config.json says of an architecture, under the names that transformers 5 and 4 read.

    It knows the families of `bridge_config.FAMILIES_OF_SETTINGS`, whose checkpoints may come without a config.json.
    """
    family = FAMILIES[dims.family]
    values: dict[str, Any] = {
        "model_type": dims.family,
        family.activation_key: family.activation,
        "num_hidden_layers": dims.num_layers,
        "hidden_size": dims.hidden_size,
        family.ffn: dims.ffn_hidden_size,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_query_groups,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab_size,
        "max_position_embeddings": dims.max_position_embeddings,
        family.norm_eps: dims.norm_eps,
        "rope_theta": dims.rope_theta,
        "rope_scaling": dims.rope_scaling and dict(dims.rope_scaling),  # transformers adds to it
        "tie_word_embeddings": dims.tied_embeddings,
    }
    if family.qkv_bias is None:
        values["attention_bias"] = dims.qkv_bias
    if family.mlp_bias:
        values["mlp_bias"] = dims.mlp_bias
    if family.partial_rotary:
        values["partial_rotary_factor"] = dims.rotary_percent
    if family.window:
        values["sliding_window"] = dims.window
    if family.experts:
        count = "num_local_experts" if "num_local_experts" in DEFAULTS[dims.family] else "num_experts"
        values[count] = dims.num_experts
        values["num_experts_per_tok"] = dims.experts_per_token
    if family.experts and family.norm_topk is None:
        values["norm_topk_prob"] = dims.norm_topk
    if "shared_expert_intermediate_size" in DEFAULTS[dims.family]:
        values["shared_expert_intermediate_size"] = dims.shared_expert_ffn
    return values
