"""A removed block of layers lives on in the MLP before it, as far as a linear map can stand for it.

Layers [a, b) go. fc2 of layer a - 1 is refitted so that the stream after it comes closest to what the teacher's stream
is before layer b,

    min over W of  sum over tokens of  weight * |r + W x - h|^2,    weight = 1 / mean(h^2),

with x the input of that fc2, r the stream before its MLP and h the stream before layer b. The weights keep the few
tokens of massive activations from deciding alone. All is measured on the teacher, in one pass.

Shape suffixes: S sequence, B batch, N tokens, F neurons, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import DataParallelSamples, forward_each
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum
from compactlm_nemo.parallel.mesh import Mesh

RIDGE = 2e-2
"""Of the bridge's refit: more than that of a cut, as a whole block has to be stood in for."""


@dataclass(frozen=True)
class BlockReplacement:
    """What the refit of one fc2 needs, float64 on the CPU of every rank."""

    gram_FF: Tensor
    """Sum of ``weight x x^T``."""
    target_FH: Tensor
    """Sum of ``weight x (h - r)^T``."""


def gaps_of(kept: list[int], num_layers: int) -> list[tuple[int, int]]:
    """The removed blocks [a, b) that have a layer before them."""
    ends = [*kept[1:], num_layers]
    return [(layer + 1, end) for layer, end in zip(kept, ends, strict=True) if end > layer + 1]


def bridge_weight(weight_HF: Tensor, bridge: BlockReplacement, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """`[H, K]` float64: the refitted fc2 over the kept neurons, ``W_k + ((G_kk + D)^-1 (B_k - G_kk W_k^T))^T``."""
    start_KH = weight_HF.double()[:, kept].T
    gram_KK = bridge.gram_FF[kept][:, kept]
    damping = ridge * bridge.gram_FF.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    return (start_KH + torch.linalg.solve(gram_KK + damping, bridge.target_FH[kept] - gram_KK @ start_KH)).T


@torch.no_grad()
def measure_bridges(
    chunks: ModelChunks,
    mesh: Mesh,
    dims: Dims,
    windows_NS: Tensor,
    gaps: list[tuple[int, int]],
    *,
    micro_batch: int,
    progress: Callable[[int], None],
) -> dict[int, BlockReplacement]:
    """The layer before each gap -> its bridge, equal on every rank. Collective.

    A micro-batch's activations are summed over the stages, each of which has some of them, after its pass.
    """
    share = DataParallelSamples(windows_NS, mesh, micro_batch)
    found = {
        start - 1: [
            torch.zeros(dims.ffn_hidden_size, width, dtype=torch.float64, device=windows_NS.device)
            for width in (dims.ffn_hidden_size, dims.hidden_size)
        ]
        for start, _ in gaps
    }
    taps = _Taps(chunks, mesh, dims, gaps)
    try:
        for idx, tokens_BS in enumerate(share.batches):
            forward_each(chunks, mesh, [tokens_BS], lambda *_: None)
            counted = int(share.counted(idx, mesh.dp_rank).sum())  # the leading ones
            for start, end in gaps:
                x_NF, r_NH = (taps.take(name, start - 1, tokens_BS)[:, :counted].flatten(0, 1) for name in "xr")
                h_NH = taps.take("h", end, tokens_BS)[:, :counted].flatten(0, 1)
                weighted_NF = x_NF / h_NH.square().mean(dim=-1, keepdim=True)
                found[start - 1][0] += weighted_NF.T @ x_NF
                found[start - 1][1] += weighted_NF.T @ (h_NH - r_NH)
            progress(share.num_counted(idx))
    finally:
        taps.remove()
    return {
        layer: BlockReplacement(*(all_reduce_sum(x, mesh.dp_cp_group).cpu() for x in sums))
        for layer, sums in found.items()
    }


class _Taps:
    """Hooks that keep what bridges need of the last micro-batch: `x` and `r` of layer a - 1, `h` of layer b."""

    def __init__(self, chunks: ModelChunks, mesh: Mesh, dims: Dims, gaps: list[tuple[int, int]]) -> None:
        self.mesh, self.dims = mesh, dims
        self.seen: dict[tuple[str, int], Tensor] = {}
        self.handles: list[Any] = []
        before, behind = {start - 1 for start, _ in gaps}, {end for _, end in gaps}
        for layer in chunks.layers():
            idx = layer.layer_number - 1
            if idx in before:
                self._keep(layer.mlp.linear_fc2, "x", idx)
                self._keep(layer.pre_mlp_layernorm, "r", idx)
            if idx in behind:
                self._keep(layer.input_layernorm, "h", idx)
        if dims.num_layers in behind and chunks[-1].post_process:
            self._keep(chunks[-1].decoder.final_layernorm, "h", dims.num_layers)

    def _keep(self, module: Any, name: str, idx: int) -> None:
        def hook(module: Any, args: Any) -> None:
            self.seen[name, idx] = args[0]

        self.handles.append(module.register_forward_pre_hook(hook))

    def take(self, name: str, idx: int, tokens_BS: Tensor) -> Tensor:
        """`[S / cp, B, F or H]` float64, on every stage."""
        own = self.seen.pop((name, idx), None)
        if own is None:
            width = self.dims.ffn_hidden_size if name == "x" else self.dims.hidden_size
            batch, length = tokens_BS.shape
            own = torch.zeros(length // self.mesh.cp_size, batch, width, device=tokens_BS.device)
        elif name == "x":
            own = all_gather(own, self.mesh.tp_group, dim=-1)
        elif self.mesh.is_sequence_parallel:
            own = all_gather(own, self.mesh.tp_group, dim=0)
        return all_reduce_sum(own.float(), self.mesh.pp_group).double()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
