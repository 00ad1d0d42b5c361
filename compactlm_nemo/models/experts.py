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
        wide_NF = grouped_mm(hidden_NH, self._weights("linear_fc1").transpose(1, 2), offs=ends_E)
        inner_NF = self._activation(wide_NF)
        inner_NF = (inner_NF * probs_N[:, None]).to(inner_NF.dtype)
        return grouped_mm(inner_NF, self._weights("linear_fc2").transpose(1, 2), offs=ends_E), None

    def _weights(self, name: str) -> Tensor:
        """Return the weights of all experts, `[E, out, in]`."""
        return torch.stack([getattr(expert, name).weight for expert in self.local_experts])

    def _activation(self, wide_NF: Tensor) -> Tensor:
        if not self.config.gated_linear_unit:
            return self.config.activation_func(wide_NF)
        gate_NF, up_NF = wide_NF.chunk(2, dim=-1)
        return self.config.activation_func(gate_NF) * up_NF


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
        and not dims.mlp_bias
        and is_aligned
        and is_bf16
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
    )


def group_experts(chunks: ModelChunks) -> None:
    """Let each layer compute its experts together from now on; hooks inside an expert then see nothing."""
    for layer in chunks.layers():
        experts: Any = layer.mlp.experts
        experts.is_grouped = True
