"""Tiny random Hugging Face models, one case for each thing that sets families apart."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCAB = 131
"""Odd, so that every layout pads it."""


LENGTH = 24
"""Tokens in a test sequence, longer than the window of the Mistral cases."""


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# Of the 8 wavelengths of a 16-wide head one is kept, two are blended and five are stretched.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


_MULTIPLIERS = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.4, "logits_scaling": 1.5,
}  # fmt: skip


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


# Of the 6 rotated channels of a 12-wide head. Its config counts the factors by hidden_size / num_attention_heads.
_LONGROPE: dict[str, Any] = {
    "head_dim": 12,
    "original_max_position_embeddings": 16,  # shorter than a test sequence
    "partial_rotary_factor": 0.5,  # here too, for versions of transformers that look nowhere else
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [1.0, 2.0, 5.0],
    },
}


_PARTIAL = {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.25}


# Two kinds of layers, each with another window and theta; products of queries and keys by another root than the heads'.
_GEMMA: dict[str, Any] = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 20,
    "pad_token_id": None,
}


# Of the 8 wavelengths of a 16-wide head two are kept, two blended and four stretched: the ramp begins and ends between
# two of them.
_GPT_OSS: dict[str, Any] = {
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 7,
    "pad_token_id": None,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150.0,
        "factor": 8.0,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}


# Heads of 12 channels that stay and 8 that turn, values of 16; the first layer dense, experts of the others in groups.
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "head_dim": 8,  # as the config sets it by itself: of the channels that turn
    "rms_norm_eps": 1e-3,  # the latents' norms have 1e-6
}


_DEEPSEEK_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
    "beta_fast": 4, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 1.5,
}  # fmt: skip


CASES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"rms_norm_eps": 1e-3}),
    "llama_tied_llama3_rope": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "llama_biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama_attention_bias": (LlamaConfig, {"attention_bias": True}),
    "llama_mlp_bias": (LlamaConfig, {"mlp_bias": True}),
    "qwen3_attention_bias": (Qwen3Config, {"attention_bias": True}),
    "mistral_window": (MistralConfig, {"sliding_window": 7}),
    "mistral_tied_no_window": (MistralConfig, {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"sliding_window": 7, "use_sliding_window": False}),
    "qwen2_tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"sliding_window": 7, "use_sliding_window": False}),
    "qwen3_tied": (Qwen3Config, {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 0, 1], "pad_token_id": None}),
    "smollm3_biases": (
        SmolLM3Config,
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "pad_token_id": None},
    ),
    "nemotron": (NemotronConfig, {"rope_parameters": _PARTIAL, "norm_eps": 1e-3}),
    "nemotron_tied_biases": (
        NemotronConfig,
        {"rope_parameters": _PARTIAL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "phi3": (
        Phi3Config,
        {"sliding_window": 7, "rope_parameters": _PARTIAL, "partial_rotary_factor": 0.25, "pad_token_id": None},
    ),
    "phi3_tied_longrope": (Phi3Config, _LONGROPE | {"tie_word_embeddings": True, "pad_token_id": None}),
    "granite": (GraniteConfig, _MULTIPLIERS | {"pad_token_id": None}),
    "granite_tied_biases": (
        GraniteConfig,
        _MULTIPLIERS | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "olmo2": (Olmo2Config, {"rms_norm_eps": 1e-3, "pad_token_id": None}),
    "olmo2_tied_bias": (Olmo2Config, {"tie_word_embeddings": True, "attention_bias": True, "pad_token_id": None}),
    "gemma3": (Gemma3TextConfig, _GEMMA),
    "gemma3_untied_bias_scaled_rope": (
        Gemma3TextConfig,
        _GEMMA
        | {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "glm": (GlmConfig, {"rope_parameters": _PARTIAL | {"partial_rotary_factor": 0.5}, "pad_token_id": None}),
    "glm_tied_no_bias": (GlmConfig, {"tie_word_embeddings": True, "attention_bias": False, "pad_token_id": None}),
    "glm4": (Glm4Config, {"rope_parameters": _PARTIAL | {"partial_rotary_factor": 0.5}, "pad_token_id": None}),
    "glm4_tied_no_bias": (Glm4Config, {"tie_word_embeddings": True, "attention_bias": False, "pad_token_id": None}),
    "mixtral": (MixtralConfig, {"intermediate_size": 24, "num_local_experts": 4, "sliding_window": 7}),
    "qwen2_moe": (Qwen2MoeConfig, _EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": (Qwen3MoeConfig, _EXPERTS | {"norm_topk_prob": True, "attention_bias": True}),
    "qwen3_moe_tied_top1": (Qwen3MoeConfig, _EXPERTS | {"num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "gpt_oss": (GptOssConfig, _GPT_OSS),
    "gpt_oss_tied_layers": (
        GptOssConfig,
        _GPT_OSS
        | {
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (DeepseekV3Config, _DEEPSEEK | {"rope_parameters": _DEEPSEEK_YARN}),
    "deepseek_v3_tied_plain": (
        DeepseekV3Config,
        _DEEPSEEK
        | {
            "tie_word_embeddings": True,
            "q_lora_rank": None,
            "rope_interleave": False,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v2": (
        DeepseekV2Config,
        _DEEPSEEK | {"topk_method": "group_limited_greedy", "rope_parameters": _DEEPSEEK_YARN},
    ),
    "deepseek_v2_tied_greedy": (
        DeepseekV2Config,
        _DEEPSEEK
        | {"tie_word_embeddings": True, "q_lora_rank": None, "routed_scaling_factor": 1.0, "first_k_dense_replace": 2},
    ),
}


EXPERT_CASES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_tied_top1", "gpt_oss", "gpt_oss_tied_layers",
)  # fmt: skip
LATENT_CASES = ("deepseek_v3", "deepseek_v3_tied_plain", "deepseek_v2", "deepseek_v2_tied_greedy")
"""Those whose attention is made from latents, with experts in all layers but the first."""


EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""transformers' plain implementations, which also take float64."""


def tiny_config(case: str, **changes: Any) -> Any:
    """The transformers config of a case."""
    kind, settings = CASES[case]
    return kind(**(_SIZES | settings | changes))


def tiny_model(case: str, **changes: Any) -> Any:
    """A float32 model in evaluation mode whose every parameter is random, norms and biases too."""
    config = tiny_config(case, **changes)
    model = AutoModelForCausalLM.from_config(config, **EAGER, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, case)))
    centre = 0.0 if config.model_type in ("nemotron", "gemma3_text") else 1.0
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *_biases_of_choice(model)]:
            is_norm = "norm" in name and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):  # with less than no score older versions pick other experts
                noise = noise.abs()
            if name.endswith("gate_up_proj_bias"):
                noise *= 20  # beyond the limits of the activation
            parameter.copy_(centre + 0.3 * noise if is_norm else 0.2 * noise)
    return model


def _biases_of_choice(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Buffers that are saved: what DeepSeek-V3 adds to scores of experts where it chooses."""
    return [(name, x) for name, x in model.named_buffers() if name.endswith("e_score_correction_bias")]


def save_tiny(case: str, folder: Path, **changes: Any) -> Any:
    """Write a case as a Hugging Face folder and return the model."""
    model = tiny_model(case, **changes)
    model.save_pretrained(folder)
    return model


def document_bounds(tokens_S: torch.Tensor, end: int) -> list[tuple[int, int]]:
    """Start and end of each document of a sample; one begins with the token that ends the one before."""
    return list(pairwise([0, *(i for i in range(1, len(tokens_S)) if tokens_S[i] == end), len(tokens_S)]))


def tokens() -> torch.Tensor:
    """`[2, LENGTH]` token ids that include the first and the last of the vocabulary."""
    ids_BS = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    ids_BS[0, 0], ids_BS[0, 1] = 0, VOCAB - 1
    return ids_BS
