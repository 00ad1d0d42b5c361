"""An architecture on a mesh -> Megatron-Core's configuration of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import activations
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.layout import split_layers
from compactlm_nemo.models.rope import attention_factor
from compactlm_nemo.parallel.mesh import Mesh


def pipeline_layout(num_layers: int, layout: ParallelConfig) -> list[list[str]] | None:
    """Return Megatron's description of `split_layers`; None without a pipeline."""
    if layout.pp == 1:
        return None
    rows = [["decoder"] * count for count in split_layers(num_layers, layout)]
    return [["embedding", *rows[0]], *rows[1:-1], [*rows[-1], "loss"]]


def transformer_config(dims: Dims, mesh: Mesh, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's configuration of an architecture; fusions are off, gradients are summed per token."""
    config = TransformerConfig(
        num_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        ffn_hidden_size=dims.dense_ffn or dims.ffn_hidden_size,
        num_attention_heads=dims.num_heads,
        num_query_groups=dims.num_query_groups,
        kv_channels=dims.head_dim,
        normalization="LayerNorm" if dims.layer_norm_1p else "RMSNorm",
        layernorm_zero_centered_gamma=dims.norm_1p,
        layernorm_epsilon=dims.norm_eps,
        gated_linear_unit=dims.gated_mlp,
        activation_func=_activation(dims),
        activation_func_clamp_value=dims.swiglu_limit,
        glu_linear_offset=0.0 if dims.swiglu_limit is None else 1.0,
        add_bias_linear=False,  # attention and MLP have their own switches: spec.py
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm,
        rotary_interleaved=dims.rotary_interleaved,
        softmax_scale=dims.attention_multiplier,
        softmax_type="learnable" if dims.attention_sinks else "vanilla",
        window_size=None if dims.window is None else (dims.window - 1, 0),
        no_rope_freq=None if dims.no_rope_layers is None else [int(without) for without in dims.no_rope_layers],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp_size,
        sequence_parallel=mesh.is_sequence_parallel,
        pipeline_model_parallel_size=mesh.pp_size,
        pipeline_model_parallel_layout=pipeline_layout(dims.num_layers, mesh.layout),
        # A batch of messages between two stages that are each other's next and previous one would be mixed up.
        overlap_p2p_comm=mesh.layout.virtual_stages > 1,
        batch_p2p_comm=mesh.layout.virtual_stages == 1,
        batch_p2p_sync=False,  # waiting for the messages orders them on the device; the host need not wait as well
        context_parallel_size=mesh.cp_size,
        expert_model_parallel_size=mesh.ep_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **(_expert_settings(dims) if dims.num_experts else {}),
    )
    # Ours, for LocalOrGlobalAttention:
    config.local_layers, config.has_local_theta = dims.local_layers, dims.local_rope_theta is not None
    if (factor := attention_factor(dims)) != 1.0:
        _multiply_rotations(config, factor)
    return config


def _activation(dims: Dims) -> Callable[[Tensor], Tensor]:
    if not dims.gated_mlp:
        squared_relu: Callable[[Tensor], Tensor] = activations.squared_relu
        return squared_relu
    if dims.swiglu_limit is not None:
        return sigmoid_gelu
    return gelu_tanh if dims.gelu else F.silu


def sigmoid_gelu(x: Tensor) -> Tensor:
    """Return ``x sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return ``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``."""
    return F.gelu(x, approximate="tanh")


def _multiply_rotations(config: TransformerConfig, factor: float) -> None:
    """Let Megatron multiply cosines and sines with `factor`.

    Its attention does so by `(0.1 mscale ln(scale) + 1) / (0.1 mscale_all_dim ln(scale) + 1)`, with the names of yarn
    whatever the frequencies are.
    """
    config.yarn_rotary_scaling_factor = math.exp(10.0)
    config.yarn_mscale = factor - 1.0
    config.yarn_mscale_all_dim = 0.0


def _expert_settings(dims: Dims) -> dict[str, Any]:
    """Return Megatron's settings of layers with experts; no loss but ours acts on the router."""
    return {
        "num_moe_experts": dims.num_experts,
        "moe_ffn_hidden_size": dims.ffn_hidden_size,
        "moe_router_topk": dims.experts_per_token,
        # A softmax over the picked logits is the softmax over all of them, scaled to sum to 1 over the picked.
        "moe_router_pre_softmax": not dims.norm_topk,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",  # a token is sent to the ranks of its experts, not to all
        "moe_shared_expert_intermediate_size": dims.shared_expert_ffn or None,
        **({} if dims.dense_layers is None else {"moe_layer_freq": [int(not dense) for dense in dims.dense_layers]}),
    }
