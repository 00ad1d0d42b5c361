"""Experts of a layer: one after another, or all of a rank in one grouped product for each matrix.

Shape suffixes: N routed tokens in the order of the experts, E experts of this rank, H hidden, F width of an expert on
this tensor-parallel rank (twice that, gate and up, before a gated activation).
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

if TYPE_CHECKING:
    from compactlm_nemo.models.build import ModelChunks

try:
    from torch.nn.functional import grouped_mm
except ImportError:  # torch before 2.10
    from torch import _grouped_mm as grouped_mm  # type: ignore[assignment]

ALIGNMENT = 8
"""The grouped product takes rows of bf16 that are multiples of 16 bytes."""
FIRST_CAPABILITY = (9, 0)
"""Devices before this one run it as a loop, or not at all."""


class Experts(SequentialMLP):
    """Megatron's sequence of MLPs, which scoring hooks one by one, and that computes them together once `is_grouped`.

    Parameters have equal names either way. The weights of all experts are copied next to each other for the products.
    """

    is_grouped = False

    def forward(self, hidden_NH: Tensor, tokens_per_expert: Tensor, probs_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ``probs_n * fc2_e(act(fc1_e(x_n)))``, e the expert of row n, `[N, H]`; partial sums under TP."""
        if not self.is_grouped:
            return super().forward(hidden_NH, tokens_per_expert, probs_N)
        ends = list(accumulate(tokens_per_expert.tolist()))
        ends_E = torch.tensor(ends, dtype=torch.int32).to(hidden_NH.device, non_blocking=True)
        wide_NF = grouped_mm(hidden_NH, self._all("linear_fc1", "weight").transpose(1, 2), offs=ends_E)
        has_biases = self.local_experts[0].linear_fc2.bias is not None
        if has_biases:
            rows_N = torch.arange(len(probs_N), dtype=ends_E.dtype, device=ends_E.device)
            experts_N = torch.searchsorted(ends_E, rows_N, right=True)
            wide_NF = wide_NF + self._all("linear_fc1", "bias")[experts_N]
        inner_NF = self._activation(wide_NF)
        inner_NF = (inner_NF * probs_N[:, None]).to(inner_NF.dtype)
        out_NH = grouped_mm(inner_NF, self._all("linear_fc2", "weight").transpose(1, 2), offs=ends_E)
        if has_biases:  # as `ExpertRowLinear`: of the sum over tensor-parallel ranks
            biases_NH = (self._all("linear_fc2", "bias") / self.tp_group.size())[experts_N]
            out_NH = (out_NH + biases_NH * probs_N[:, None]).to(out_NH.dtype)
        return out_NH, None

    def _all(self, linear: str, kind: str) -> Tensor:
        """Return the weights of all experts, `[E, out, in]`, or their biases, `[E, out]`."""
        return torch.stack([getattr(getattr(expert, linear), kind) for expert in self.local_experts])

    def _activation(self, wide_NF: Tensor) -> Tensor:
        """Return what `MLP` of Megatron does, whose function is within its forward."""
        config = self.config
        if not config.gated_linear_unit:
            return config.activation_func(wide_NF)
        gate_NF, up_NF = wide_NF.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate_NF, up_NF = gate_NF.clamp(max=limit), up_NF.clamp(-limit, limit)
        return config.activation_func(gate_NF) * (up_NF + config.glu_linear_offset)


def add_bias(router: Any) -> None:
    """Give a router a bias, which Megatron has together with that of every other linear layer alone."""
    weight = router.weight
    router.bias = torch.nn.Parameter(weight.new_zeros(weight.shape[0]))
    router.bias.sequence_parallel = weight.sequence_parallel


def can_group(chunks: ModelChunks, device: torch.device) -> bool:
    """Return whether the device has a grouped product for the experts of this model."""
    dims, config = chunks.dims, chunks.plain()[0].config
    widths = (dims.hidden_size, dims.ffn_hidden_size // chunks.mesh.tp_size)
    is_aligned = all(width % ALIGNMENT == 0 for width in widths)
    is_bf16 = config.params_dtype is torch.bfloat16
    return (
        dims.num_experts > 0
        and is_aligned
        and is_bf16
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
    )


def group_experts(chunks: ModelChunks) -> None:
    """Let each layer compute its experts together from now on; hooks inside an expert then see nothing."""
    for layer in chunks.layers():
        if not chunks.dims.is_dense(layer.layer_number - 1):
            experts: Any = layer.mlp.experts
            experts.is_grouped = True
