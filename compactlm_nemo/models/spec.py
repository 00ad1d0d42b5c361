"""Layer specification for Megatron-Core without Transformer Engine: our norm and attention, its linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from compactlm_nemo.models.attention import LocalOrGlobalAttention, NormedOverHeads, SdpaCoreAttention
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.experts import Experts
from compactlm_nemo.models.latent_attention import LatentAttention


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, with weight 1 + w when the config centres its weight at zero.

    Statistics are float32. The weight carries `sequence_parallel`, by which Megatron sums its gradient over TP ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.is_layer_norm = config.normalization == "LayerNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if self.is_layer_norm:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[-1],)
        if self.is_layer_norm:
            weight = self.weight + 1 if self.zero_centered else self.weight
            return F.layer_norm(x, shape, weight, self.bias, self.eps)
        if self.zero_centered:  # 1 + w would lose most digits of w in bfloat16
            wide = torch.promote_types(x.dtype, torch.float32)
            return F.rms_norm(x.to(wide), shape, self.weight.to(wide) + 1, self.eps).to(x.dtype)
        return F.rms_norm(x, shape, self.weight, self.eps)


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """With a bias, whatever the config says: Megatron has one switch for attention and MLP, families have two."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})


class RowLinear(RowParallelLinear):
    """Megatron's, told its group, which it would otherwise look up with a warning at every call; that ends a graph."""

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Any:
        return super()._forward_impl(*args, **{**kwargs, "tp_group": self.tp_group})


class BiasedRowLinear(RowLinear):
    """As `BiasedColumnParallelLinear`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})


class NormedRowLinear(RowLinear):
    """With a norm of what the linear map writes, its bias included."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.post_layernorm = Norm(self.config, self.output_size, eps=self.config.layernorm_epsilon)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        out, bias = super().forward(x)
        return self.post_layernorm(out if bias is None else out + bias), None


class NormedBiasedRowLinear(NormedRowLinear, BiasedRowLinear):
    """Both."""


ROW_LINEARS: dict[tuple[bool, bool], type[RowLinear]] = {
    (False, False): RowLinear,
    (True, False): BiasedRowLinear,
    (False, True): NormedRowLinear,
    (True, True): NormedBiasedRowLinear,
}
"""(has a bias, has a norm behind it) -> the output projection of attention, or fc2."""


class ExpertRowLinear(BiasedRowLinear):
    """With a bias that the experts' sum over tensor-parallel ranks has once: each rank adds its part of the bias.

    Gradients of the ranks are parts as well, which Megatron sums, as it does for a bias behind sequence parallelism.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, bias = super().forward(x)
        # A copy: Megatron adds the bias in place, to what autograd calls a view where no rank has to be asked.
        return out.clone(), bias / self.tp_group.size()


class ResidualAdd(torch.nn.Module):
    """What attention or MLP writes goes to the residual stream times a multiplier: ``r + multiplier * (x + bias)``.

    In Megatron's place of bias, dropout and addition, without dropout.
    """

    def __init__(self, multiplier: float) -> None:
        super().__init__()
        self.multiplier = multiplier

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return self.add

    def add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        return residual + (x if bias is None else x + bias) * self.multiplier


class GatedSharedExpertMLP(SharedExpertMLP):
    """A shared expert with its gate, however this Megatron says so: in the specification (0.15) or in the config."""

    has_gate = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "gate": self.has_gate})


class PlainSharedExpertMLP(GatedSharedExpertMLP):
    """A shared expert without a gate."""

    has_gate = False


def layer_spec(dims: Dims) -> ModuleSpec:
    """Return one decoder layer: separate norms, so that scoring can hook the same places in every model."""
    norm = Norm if dims.norm_before else IdentityOp
    add: Any = get_bias_dropout_add
    if dims.residual_multiplier != 1:
        add = ModuleSpec(module=ResidualAdd, params={"multiplier": dims.residual_multiplier})
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention_spec(dims),
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=mlp_spec(dims),
            mlp_bda=add,
        ),
    )


def _attention_spec(dims: Dims) -> ModuleSpec:
    linear_proj, norm_qk = ROW_LINEARS[dims.proj_bias, dims.norm_after], Norm if dims.qk_norm else IdentityOp
    if dims.kv_lora_rank:
        params = {"dims": dims, "norm": Norm, "linear_proj": linear_proj}
        return ModuleSpec(module=LatentAttention, params=params)
    return ModuleSpec(
        module=_attention(dims),
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SdpaCoreAttention,
            linear_proj=linear_proj,
            q_layernorm=norm_qk,
            k_layernorm=norm_qk,
        ),
    )


def _attention(dims: Dims) -> type[SelfAttention]:
    """Return the kind of attention; no family has what both of the others add."""
    if dims.local_layers is not None:
        return LocalOrGlobalAttention
    return NormedOverHeads if dims.qk_norm_over_heads else SelfAttention


def mlp_spec(dims: Dims) -> ModuleSpec:
    """Return the MLP of a layer, or its router and experts, each expert an MLP by itself."""
    of_expert = dims.num_experts > 0 and dims.mlp_bias
    matrices = MLPSubmodules(
        linear_fc1=BiasedColumnParallelLinear if dims.mlp_bias else ColumnParallelLinear,
        linear_fc2=ExpertRowLinear if of_expert else ROW_LINEARS[dims.mlp_bias, dims.norm_after],
    )
    if not dims.num_experts:
        return ModuleSpec(module=MLP, submodules=matrices)
    shared = GatedSharedExpertMLP if dims.shared_expert_gate else PlainSharedExpertMLP
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=Experts, submodules=matrices),
            shared_experts=ModuleSpec(module=shared, submodules=matrices),
        ),
    )


def block_spec(dims: Dims, layers: range) -> TransformerBlockSubmodules:
    """Return the layers of one pipeline stage, by their numbers in the model, and the final norm."""
    specs = [layer_spec(dims.of_layer(layer)) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm)
