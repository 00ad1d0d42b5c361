"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one latent.

A module of ours and not Megatron-Core's: on several tensor-parallel ranks without sequence parallelism its gradient of
the turned key would be that of one rank's heads alone, and it makes rotary frequencies of its own in every layer.

Shape suffixes: S queries of this rank, P the part of them that it has under sequence parallelism (else S), B samples,
H hidden, L channels of a latent, N heads of this tensor-parallel rank, Q channels of a query or key, R those that turn,
V channels of a value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from compactlm_nemo.models.attention import SdpaCoreAttention
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.rope import attention_factor

LATENT_EPS = 1e-6
"""Epsilon of the latents' norms: DeepSeek's models give theirs none, whatever `rms_norm_eps` says."""


class ReplicatedLinear(torch.nn.Module):
    """A linear map that every tensor-parallel rank holds whole, for its tokens.

    Its weight carries `sequence_parallel`, by which Megatron sums its gradient over the ranks.
    """

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class LatentAttention(MegatronModule):
    """Attention of heads whose queries, keys and values are made from latents, causal or as the mask says.

    ``q = U_q norm(D_q x)`` (or ``W_q x``), ``(c, k_R) = D_kv x`` and ``(k, v) = U_kv norm(c)`` of each head; the last R
    channels of q, and k_R, which all heads share, turn. The softmax is over ``scale * (q, k | k_R)``, its scale the
    config's. x `[s, b, h]`, or the rank's part of s under sequence parallelism; so is what is returned, with no bias.

    Args:
        dims: Of the model.
        norm: Module of the latents' norms.
        linear_proj: Module of the output projection.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        dims: Dims,
        norm: type[torch.nn.Module],
        linear_proj: type[torch.nn.Module],
        pg_collection: Any,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.dims, self.layer_number, self.tp_group, self.cp_group = (
            dims,
            layer_number,
            pg_collection.tp,
            pg_collection.cp,
        )
        self.rotary_factor = attention_factor(dims)

        def by_heads(inputs: int, channels: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                inputs, dims.num_heads * channels, config=config, init_method=config.init_method, bias=False,
                gather_output=False, tp_group=self.tp_group,
            )  # fmt: skip

        if dims.q_lora_rank:
            self.linear_q_down_proj = ReplicatedLinear(config, dims.hidden_size, dims.q_lora_rank)
            self.q_layernorm = norm(config, dims.q_lora_rank, eps=LATENT_EPS)
            self.linear_q_up_proj = by_heads(dims.q_lora_rank, dims.qk_head_dim)
        else:
            self.linear_q_proj = by_heads(dims.hidden_size, dims.qk_head_dim)
        self.linear_kv_down_proj = ReplicatedLinear(config, dims.hidden_size, dims.kv_lora_rank + dims.qk_rope_head_dim)
        self.kv_layernorm = norm(config, dims.kv_lora_rank, eps=LATENT_EPS)
        self.linear_kv_up_proj = by_heads(dims.kv_lora_rank, dims.qk_nope_head_dim + dims.head_dim)
        self.core_attention = SdpaCoreAttention(config, pg_collection=pg_collection)
        self.linear_proj = linear_proj(
            dims.num_heads * dims.head_dim, dims.hidden_size, config=config, bias=False, input_is_parallel=True,
            init_method=config.output_layer_init_method, skip_bias_add=True, is_expert=False, tp_group=self.tp_group,
        )  # fmt: skip

    def forward(
        self, x_PBH: Tensor, attention_mask: Tensor | None, *_: object, rotary_pos_emb: Tensor, **__: object
    ) -> tuple[Tensor, Tensor | None]:
        q_SBNQ = self._queries(x_PBH)
        k_SBNQ, v_SBNV = self._keys_and_values(x_PBH, rotary_pos_emb)
        still_SBNQ, turning_SBNR = q_SBNQ.split([self.dims.qk_nope_head_dim, self.dims.qk_rope_head_dim], dim=-1)
        q_SBNQ = torch.cat([still_SBNQ, self._turned(turning_SBNR, rotary_pos_emb)], dim=-1)
        out: tuple[Tensor, Tensor | None] = self.linear_proj(
            self.core_attention(q_SBNQ, k_SBNQ, v_SBNV, attention_mask)
        )
        return out

    def _queries(self, x_PBH: Tensor) -> Tensor:
        if self.dims.q_lora_rank:
            q_SBE, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(x_PBH)))
        else:
            q_SBE, _ = self.linear_q_proj(x_PBH)
        return q_SBE.unflatten(-1, (-1, self.dims.qk_head_dim))

    def _keys_and_values(self, x_PBH: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        dims = self.dims
        latent_PBL, shared_PBR = self.linear_kv_down_proj(x_PBH).split(
            [dims.kv_lora_rank, dims.qk_rope_head_dim], dim=-1
        )
        kv_SBE, _ = self.linear_kv_up_proj(self.kv_layernorm(latent_PBL))
        k_SBNQ, v_SBNV = kv_SBE.unflatten(-1, (-1, dims.qk_nope_head_dim + dims.head_dim)).split(
            [dims.qk_nope_head_dim, dims.head_dim], dim=-1
        )
        # Each rank's heads use the shared key: its gradient is summed over the ranks.
        if self.config.sequence_parallel:
            shared_SBR = gather_from_sequence_parallel_region(shared_PBR, group=self.tp_group)
        else:
            shared_SBR = copy_to_tensor_model_parallel_region(shared_PBR, group=self.tp_group)
        turned_SBNR = self._turned(shared_SBR[:, :, None], angles).expand(-1, -1, k_SBNQ.shape[2], -1)
        return torch.cat([k_SBNQ, turned_SBNR], dim=-1), v_SBNV

    def _turned(self, x_SBNR: Tensor, angles: Tensor) -> Tensor:
        turned: Tensor = apply_rotary_pos_emb(
            x_SBNR, angles, config=self.config, mscale=self.rotary_factor, cp_group=self.cp_group
        )
        return turned
