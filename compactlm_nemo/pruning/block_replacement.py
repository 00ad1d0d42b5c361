"""The MLP before a removed block of layers replaces the block, as far as a linear map can.

Where layers [a, b) are removed, fc2 of layer a - 1 is refitted so that the stream after it comes closest to what the
teacher's stream is before layer b,

    min over W of  sum over tokens of  weight * |r + W x + c - h|^2,    weight = 1 / mean(h^2),

over the tokens that count (`data.marks`), with x the input of that fc2, c its bias, which stays, r the stream before
its MLP and h the stream before layer b; h - r is divided by the model's residual multiplier. The weights keep the few
tokens of massive activations from deciding alone. All sums are measured on the teacher, in one pass.

Shape suffixes: S sequence, B batch, N tokens, F neurons, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compactlm_nemo.data.marks import counts_of
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import DataParallelSamples, context_share, forward_each
from compactlm_nemo.models.taps import Taps, on_every_stage
from compactlm_nemo.parallel.collectives import all_reduce_sum

RIDGE = 2e-2
"""The ridge of the refit is larger than that of a cut, as fc2 has to replace a whole block."""


@dataclass(frozen=True)
class BlockReplacement:
    """Sums that the refit of one fc2 needs, float64 on the CPU of every rank."""

    gram_FF: Tensor
    """Sum of ``weight x x^T``."""
    target_FH: Tensor
    """Sum of ``weight x (h - r - c)^T``."""


def removed_blocks(layers: list[int], num_layers: int) -> list[tuple[int, int]]:
    """Return the removed blocks [a, b) that have a layer before them, whose fc2 can replace the block."""
    ends = [*layers[1:], num_layers]
    return [(layer + 1, end) for layer, end in zip(layers, ends, strict=True) if end > layer + 1]


def replacement_weight(
    weight_HF: Tensor, replacement: BlockReplacement, neurons: Tensor, ridge: float = RIDGE
) -> Tensor:
    """Refit fc2 over the K neurons that stay, `[H, K]` float64: ``W_k + ((G_kk + D)^-1 (B_k - G_kk W_k^T))^T``."""
    start_KH = weight_HF.double()[:, neurons].T
    gram_KK = replacement.gram_FF[neurons][:, neurons]
    damping = ridge * replacement.gram_FF.diagonal().mean() * torch.eye(len(neurons), dtype=torch.float64)
    target_KH = replacement.target_FH[neurons]
    return (start_KH + torch.linalg.solve(gram_KK + damping, target_KH - gram_KK @ start_KH)).T


@torch.no_grad()
def measure_replacements(
    chunks: ModelChunks,
    windows_NS: Tensor,
    blocks: list[tuple[int, int]],
    *,
    micro_batch: int,
    progress: Callable[[int], None],
) -> dict[int, BlockReplacement]:
    """Measure the replacement of each block, by the layer before the block, equal on every rank. Collective.

    After the pass of a micro-batch the stages, each of which has some of the activations, add them up.
    """
    mesh, dims = chunks.mesh, chunks.dims
    samples = DataParallelSamples(windows_NS, mesh, micro_batch)
    sums = {
        start - 1: [
            torch.zeros(dims.ffn_hidden_size, width, dtype=torch.float64, device=windows_NS.device)
            for width in (dims.ffn_hidden_size, dims.hidden_size)
        ]
        for start, _ in blocks
    }
    taps, biases = _tapped(chunks, dims, blocks), _biases(chunks, blocks)

    def tokens_of(name: str, width: int, tokens_BS: Tensor, counted: int) -> Tensor:
        x_SBE = on_every_stage(taps.pop(name), mesh, tokens_BS=tokens_BS, width=width, is_sharded=name.startswith("x"))
        return x_SBE[:, :counted].flatten(0, 1).double()

    try:
        for idx, tokens_BS in enumerate(samples.batches):
            forward_each(chunks, [tokens_BS], lambda *_: None)
            for name, bias_H in biases.items():
                taps.seen[name] = taps.seen[name] + dims.residual_multiplier * bias_H
            counted = samples.num_local(idx)
            for start, end in blocks:
                x_NF = tokens_of(f"x.{start - 1}", dims.ffn_hidden_size, tokens_BS, counted)
                r_NH = tokens_of(f"r.{start - 1}", dims.hidden_size, tokens_BS, counted)
                h_NH = tokens_of(f"h.{end}", dims.hidden_size, tokens_BS, counted)
                counts_N1 = context_share(counts_of(tokens_BS[:counted]), mesh).T.flatten()[:, None]
                weighted_NF = x_NF / h_NH.square().mean(dim=-1, keepdim=True) * counts_N1
                sums[start - 1][0] += weighted_NF.T @ x_NF
                sums[start - 1][1] += weighted_NF.T @ ((h_NH - r_NH) / dims.residual_multiplier)
            progress(samples.num_counted(idx))
    finally:
        taps.remove()
    return {
        layer: BlockReplacement(*(all_reduce_sum(x, mesh.dp_cp_group).cpu() for x in parts))
        for layer, parts in sums.items()
    }


def _biases(chunks: ModelChunks, blocks: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Return the bias of fc2 under the name of the tapped stream that it is added to, of the layers on this rank."""
    before = {start - 1 for start, _ in blocks}
    return {
        f"r.{layer.layer_number - 1}": layer.mlp.linear_fc2.bias
        for layer in chunks.layers()
        if layer.layer_number - 1 in before and layer.mlp.linear_fc2.bias is not None
    }


def _tapped(chunks: ModelChunks, dims: Dims, blocks: list[tuple[int, int]]) -> Taps:
    """Tap `x` and `r` of layer a - 1 and `h` before layer b, on the ranks that have these layers."""
    taps = Taps()
    before, behind = {start - 1 for start, _ in blocks}, {end for _, end in blocks}
    for layer in chunks.layers():
        idx = layer.layer_number - 1
        if idx in before:
            taps.input(layer.mlp.linear_fc2, f"x.{idx}")
            taps.input(layer.pre_mlp_layernorm, f"r.{idx}")
        if idx in behind:
            taps.input(layer.input_layernorm, f"h.{idx}")
    if dims.num_layers in behind and chunks[-1].post_process:
        taps.input(chunks[-1].decoder.final_layernorm, f"h.{dims.num_layers}")
    return taps
