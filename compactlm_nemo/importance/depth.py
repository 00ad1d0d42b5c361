"""Layers are as important as what the output loses without them: language-model loss, or error of the logits.

All metrics come from one walk (`layer_sums`), part by part if wanted, as the sums add up.

Shape suffixes: N tokens, S sequence, B batch, H width, V vocabulary rows of this rank, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compactlm_nemo.data.marks import counts_of, ids_of
from compactlm_nemo.errors import ConfigError, NumericsError
from compactlm_nemo.importance.leave_one_out import leave_one_out
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import DataParallelSamples, context_share
from compactlm_nemo.parallel.collectives import all_reduce_sum
from compactlm_nemo.parallel.mesh import Mesh

TokenLosses = Callable[[Tensor, Tensor], Tensor]
"""(hidden `[N, H]`, labels `[N]`) -> losses in nats `[N]`, equal on all tensor-parallel ranks. Last stage only."""


@dataclass(frozen=True, kw_only=True)
class LayerSums:
    """Sums that the metrics are made of, over some calibration samples; `+` adds the sums of further samples."""

    sums: Tensor
    """`[L + 1, 3]`: as `LeftOut.sums`; loss in nats, squared error of the logits, and in row L their squares."""
    tokens: int
    """Predictions that count."""
    layers_run: int
    """As `LeftOut.layers_run`."""
    removed: frozenset[int]
    """Rows that are NaN: layers left out of every run, and those at which no block begins."""

    def __add__(self, other: LayerSums) -> LayerSums:
        return LayerSums(
            sums=self.sums + other.sums,
            tokens=self.tokens + other.tokens,
            layers_run=self.layers_run + other.layers_run,
            removed=self.removed,
        )


def layer_sums(
    chunks: ModelChunks,
    windows_NS: Tensor,
    *,
    micro_batch: int,
    token_losses: TokenLosses | None,
    logits: bool,
    removed: frozenset[int] = frozenset(),
    block: int = 1,
    progress: Callable[[int], None],
) -> LayerSums:
    """Measure the sums of all metrics in one walk over calibration windows, equal on every rank. Collective.

    Args:
        windows_NS: `[n, S]`, equal on every rank; data-parallel ranks take every dp-th. A window has no target
            column: tokens 1 to S - 1 are predicted.
        token_losses: For `lm_loss_rise`; None leaves the loss out.
        logits: For `logit_mse`; False leaves the logits out.
        removed: Layers left out of every run but the whole model's, to which logits are compared.
        block: Layers left out together, from each layer on.
        progress: Called with the number of samples of every finished batch over all data-parallel ranks, on every rank.
    """
    mesh, dims = chunks.mesh, chunks.dims
    samples = DataParallelSamples(windows_NS, mesh, micro_batch)

    def measure(idx: int, left_out: int | None, hidden_SBH: Tensor, whole_SBH: Tensor) -> Tensor:
        counted = samples.num_local(idx)
        hidden_SBH, whole_SBH = hidden_SBH[:, :counted], whole_SBH[:, :counted]
        sums = hidden_SBH.new_zeros(3, dtype=torch.float64)
        if token_losses is not None:
            labels_N, mask_N = _targets(samples.batches[idx][:counted], mesh)
            sums[0] = (token_losses(hidden_SBH.flatten(0, 1), labels_N).double() * mask_N).sum()
        if logits:
            weight_VH = _unpadded(chunks.head_weight, dims, mesh)
            wide = torch.promote_types(hidden_SBH.dtype, torch.float32)
            # The head is linear, so these are the logits of the difference: nothing that both have in common hides it.
            gap_SBH = (whole_SBH.to(wide) - hidden_SBH.to(wide)).to(hidden_SBH.dtype)
            counts_N1 = context_share(counts_of(samples.batches[idx][:counted]), mesh).T.flatten()[:, None]
            sums[1] = _logit_squares(gap_SBH, weight_VH, chunks.chunk_tokens, counts_N1)
            if left_out is None:
                sums[2] = _logit_squares(whole_SBH, weight_VH, chunks.chunk_tokens, counts_N1)
            sums[1:] = all_reduce_sum(sums[1:], mesh.tp_group)
        return sums

    totals = leave_one_out(
        chunks,
        samples.batches,
        measure,
        num_sums=3,
        removed=removed,
        block=block,
        progress=lambda idx: progress(samples.num_counted(idx)),
    )
    return LayerSums(
        sums=totals.sums,
        tokens=num_predictions(windows_NS),
        layers_run=totals.layers_run,
        removed=removed | set(range(dims.num_layers - block + 1, dims.num_layers)),
    )


def num_predictions(windows_NS: Tensor) -> int:
    """Return how many tokens of windows without their last label are predicted and count."""
    return int(counts_of(windows_NS[:, :-1]).sum())


def _targets(tokens_BS: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Give the next tokens of this context-parallel rank's places and a mask, both `[N]`.

    The mask is 0 where no token follows, and where the place is marked (`data.marks`).
    """
    labels_BS, mask_BS = ids_of(tokens_BS).roll(-1, dims=1), counts_of(tokens_BS).double()
    mask_BS[:, -1] = 0
    labels, mask = (context_share(x, mesh).T.flatten() for x in (labels_BS, mask_BS))
    return labels, mask


def _unpadded(weight_VH: Tensor, dims: Dims, mesh: Mesh) -> Tensor:
    """Return the rows of this rank's part of the output layer without those that pad the vocabulary."""
    return weight_VH[: max(dims.vocab_size - mesh.tp_rank * len(weight_VH), 0)]


def _logit_squares(hidden_SBH: Tensor, weight_VH: Tensor, chunk_tokens: int, counts_N1: Tensor) -> Tensor:
    """Sum ``sum_nv (hidden_n . weight_v)^2`` over tokens that count, squared in float32 or wider, summed in float64."""
    total = hidden_SBH.new_zeros((), dtype=torch.float64)
    for rows_NH in (hidden_SBH.flatten(0, 1) * counts_N1).split(chunk_tokens):
        logits_NV = rows_NH @ weight_VH.T
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        total += logits_NV.to(wide).square().sum(dtype=torch.float64)
    return total


def lm_loss_rise(measured: LayerSums) -> Tensor:
    """Return `[L]` float64: loss without layer j minus that of the model, nats a token, mean over predicted tokens.

    Source: Minitron (arXiv 2407.14679), section 2.2, which ranks by the perplexity: the order is equal.
    """
    loss = measured.sums[:, 0] / measured.tokens
    return _finite(loss[:-1] - loss[-1], measured.removed)


def logit_mse(measured: LayerSums) -> Tensor:
    """Return `[L]` float64: ``s_j = sum (M_full - M_-j)^2 / sum M_full^2``, M the logits, over tokens and vocabulary.

    M_full is of the whole model, whatever has been removed. Source: Nemotron Elastic (arXiv 2511.16664).
    """
    return _finite(measured.sums[:-1, 1] / measured.sums[-1, 2], measured.removed)


def _finite(scores_L: Tensor, removed: frozenset[int]) -> Tensor:
    """Pass the scores on; raise NumericsError where a measured one is not finite."""
    for layer, score in enumerate(scores_L.tolist()):
        if layer not in removed and not math.isfinite(score):
            raise NumericsError(
                f"score: the outputs without layer {layer} are NaN or infinite; check the teacher's weights, or score "
                "with model.precision=fp32."
            )
    return scores_L


def logit_mse_iterative(
    measure: Callable[[frozenset[int]], Tensor], iterations: int
) -> tuple[Tensor, list[tuple[int, float]]]:
    """Remove the least important layer for good, measure the others again, `iterations` times.

    Args:
        measure: Removed layers -> `logit_mse` of the others.
        iterations: Layers to remove, in [1, L - 1].
    Returns:
        `[L]` float32, and (layer, its s when it was removed) in order of removal. Ascending, the vector first gives the
        removed layers in that order, then the others by their s of the last round. As s may fall from one round to
        the next, a value is the largest s up to there; a tie is broken upwards by the smallest float32 step.
    """
    s_L = measure(frozenset())
    if not 0 < iterations < len(s_L):
        raise ConfigError(f"score.iterations={iterations} must be in [1, {len(s_L) - 1}] for {len(s_L)} layers.")
    removed: list[tuple[int, float]] = []
    while True:
        removed_layers = {layer for layer, _ in removed}
        others = sorted((float(s), j) for j, s in enumerate(s_L) if j not in removed_layers)
        removed.append((others[0][1], others[0][0]))
        if len(removed) == iterations:
            break
        s_L = measure(frozenset(layer for layer, _ in removed))
    ranked = removed + [(layer, s) for s, layer in others[1:]]
    values_L = torch.zeros(len(s_L), dtype=torch.float32)
    last = torch.tensor(-torch.inf)
    for layer, s in ranked:
        last = torch.maximum(torch.tensor(s, dtype=torch.float32), torch.nextafter(last, torch.tensor(torch.inf)))
        values_L[layer] = last
    return values_L, removed
