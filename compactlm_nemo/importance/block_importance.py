"""One forward pass gives the block importance of every contiguous block of layers.

``BI(i, n) = 1 - E[cos(x_i, x_{i+n})]``, x_i the input of layer i, x_L the output of the last layer, E over all tokens:
what the residual stream changes over the n layers from i on. All blocks together are one Gram matrix of the normalised
states of a token, summed over tokens.

Source: Minitron (arXiv 2407.14679), section 2.2. Shape suffixes: P states, L + 1 of them, N tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.data.marks import counts_of
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import DataParallelSamples, context_share, forward_each, sequence_share
from compactlm_nemo.models.layout import split_layers
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum
from compactlm_nemo.parallel.mesh import Mesh

CHUNK_TOKENS = 1024
"""Most tokens whose states exist in float32 at once."""


@torch.no_grad()
def state_cosines(
    chunks: ModelChunks, windows_NS: Tensor, *, micro_batch: int, progress: Callable[[int], None]
) -> Tensor:
    """Sum ``cos(x_i, x_j)`` over all tokens that count, ``[L + 1, L + 1]`` float64 on every rank. Collective.

    The states of one micro-batch are kept on their stages and exchanged after its pass, a few tokens at a time.
    """
    mesh, dims = chunks.mesh, chunks.dims
    samples = DataParallelSamples(windows_NS, mesh, micro_batch)
    total = torch.zeros(dims.num_layers + 1, dims.num_layers + 1, dtype=torch.float64, device=windows_NS.device)
    for idx, tokens_BS in enumerate(samples.batches):
        states = _states_of(chunks, tokens_BS)
        counted_BS = (
            samples.counted(idx, mesh.dp_rank).to(tokens_BS.device, non_blocking=True)[:, None].expand_as(tokens_BS)
        )
        counted_SB = sequence_share(context_share(counted_BS & counts_of(tokens_BS), mesh).T, mesh)
        total += _gram(states, counted_SB.flatten(), mesh, dims)
        progress(samples.num_counted(idx))
    if mesh.is_sequence_parallel:
        total = all_reduce_sum(total, mesh.tp_group)
    return all_reduce_sum(total, mesh.dp_cp_group).cpu()


def block_importance(cosines_PP: Tensor, tokens: int) -> Tensor:
    """Return ``[L, L]`` float32: BI of the block of n layers from layer i at ``[i, n - 1]``, NaN where none fits."""
    num_layers = cosines_PP.shape[0] - 1
    result = torch.full((num_layers, num_layers), torch.nan)
    for i in range(num_layers):
        result[i, : num_layers - i] = (1 - cosines_PP[i, i + 1 :] / tokens).float()
    return result


def _states_of(chunks: ModelChunks, tokens_BS: Tensor) -> list[Tensor]:
    """Run a batch, keep the inputs of this rank's layers and on the last stage the last output; `[S, B, H]` each."""
    states: list[Tensor] = []

    def keep_input(layer: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(layer: Any, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    layers = list(chunks.layers())
    handles = [layer.register_forward_pre_hook(keep_input, with_kwargs=True) for layer in layers]
    if chunks[-1].post_process:
        handles.append(layers[-1].register_forward_hook(keep_output))
    forward_each(chunks, [tokens_BS], lambda *_: None)
    for handle in handles:
        handle.remove()
    return _first_passes(states, chunks)


def _first_passes(states: list[Tensor], chunks: ModelChunks) -> list[Tensor]:
    """Drop the repetitions: a schedule runs each chunk on the batch `pp_size` times where stages are virtual."""
    if len(chunks) == 1:
        return states
    first, start = [], 0
    for chunk in chunks:
        num = len(chunk.decoder.layers) + chunk.post_process
        first += states[start : start + num]
        start += num * chunks.mesh.pp_size
    return first


def _gram(states: list[Tensor], counted_N: Tensor, mesh: Mesh, dims: Dims) -> Tensor:
    """Sum the products of all normalised states over the counted tokens, `[L + 1, L + 1]`."""
    flat = [state.flatten(0, 1) for state in states]
    order, most = _order(mesh, dims)
    order = order.to(counted_N.device, non_blocking=True)
    gram = torch.zeros(dims.num_layers + 1, dims.num_layers + 1, dtype=torch.float64, device=counted_N.device)
    for start in range(0, len(counted_N), CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        states_PNH = torch.stack([F.normalize(x[rows].float(), dim=-1) * counted_N[rows, None] for x in flat])
        if mesh.pp_size > 1:
            padded = F.pad(states_PNH, (0, 0, 0, 0, 0, most - len(states_PNH)))
            states_PNH = all_gather(padded, mesh.pp_group, dim=0)[order]
        points = states_PNH.flatten(1)
        gram += (points @ points.T).double()
    return gram


def _order(mesh: Mesh, dims: Dims) -> tuple[Tensor, int]:
    """Return the index of each state among the gathered ones, and the most states that a stage has."""
    counts = split_layers(dims.num_layers, mesh.layout)
    nums = [sum(counts[rank :: mesh.pp_size]) + (rank == mesh.pp_size - 1) for rank in range(mesh.pp_size)]
    next_index = [rank * max(nums) for rank in range(mesh.pp_size)]
    order: list[int] = []
    for chunk, count in enumerate(counts):
        rank = chunk % mesh.pp_size
        num = count + (chunk == len(counts) - 1)
        order += range(next_index[rank], next_index[rank] + num)
        next_index[rank] += num
    return torch.tensor(order), max(nums)
