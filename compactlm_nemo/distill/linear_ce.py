"""Language-model loss from hidden states: full logits never exist, the vocabulary may be sharded.

Shape suffixes: N tokens, V vocabulary rows of this rank, H width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from compactlm_nemo.distill.linear_kd import Gradients, ce_gradient, check_tokens, masked, wanted_gradients
from compactlm_nemo.distill.vocabulary import Shard, blocks, chunks, wide


def linear_ce_sum(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    mask_N: Tensor,
    *,
    chunk_tokens: int,
    vocab_size: int,
    vocab_start: int = 0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Summed language-model loss in nats, computed chunk by chunk together with its gradient.

    ``sum_n mask_n * (log sum_v exp(z_nv) - z_n,label)`` with ``z = hidden @ weight.T`` over the unpadded vocabulary.
    The gradient to the logits is ``mask_n * (softmax(z)_nv - [v = label_n])``.

    Args: as in ``linear_kd``, with the same gradients.
    Returns:
        Scalar, float32 or wider, equal on every rank of ``tp_group``.
    """
    check_tokens(hidden_NH, labels_N, mask_N, chunk_tokens)
    shard, wanted = Shard(vocab_size, vocab_start, tp_group), wanted_gradients(hidden_NH, weight_VH)
    return _LinearCE.apply(hidden_NH, weight_VH, labels_N, mask_N, chunk_tokens, shard, wanted)


@torch.no_grad()
def linear_ce(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    mask_N: Tensor,
    *,
    chunk_tokens: int,
    vocab_size: int,
    vocab_start: int = 0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Per-token language-model loss in nats, without gradient.

    ``mask_n * (log sum_v exp(z_nv) - z_n,label)`` with ``z = hidden @ weight.T`` over the unpadded vocabulary.

    Args: as in ``linear_kd``.
    Returns:
        ``[N]``, float32 or wider, equal on every rank of ``tp_group``; neither summed nor averaged.
    """
    check_tokens(hidden_NH, labels_N, mask_N, chunk_tokens)
    shard = Shard(vocab_size, vocab_start, tp_group)
    out_N = torch.zeros(hidden_NH.shape[0], dtype=wide(hidden_NH), device=hidden_NH.device)
    for rows in chunks(hidden_NH.shape[0], chunk_tokens):
        logits_NV = shard.logits(hidden_NH[rows], weight_VH)
        for block in blocks(logits_NV, shard):
            (model,) = shard.log_probs([logits_NV[block]], labels_N[rows][block], 1.0)
            out_N[rows][block] = masked(model.ce_N, mask_N[rows][block])
    return out_N


class _LinearCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        mask_N: Tensor,
        chunk_tokens: int,
        shard: Shard,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        dtype = wide(hidden_NH)
        gradients = Gradients(hidden_NH, weight_VH, shard, wanted)
        ce_sum = torch.zeros((), dtype=dtype, device=hidden_NH.device)
        for rows in chunks(hidden_NH.shape[0], chunk_tokens):
            logits_NV, row_labels_N, row_mask_N = shard.logits(hidden_NH[rows], weight_VH), labels_N[rows], mask_N[rows]
            for block in blocks(logits_NV, shard):
                (model,) = shard.log_probs([logits_NV[block]], row_labels_N[block], 1.0)
                ce_sum += masked(model.ce_N, row_mask_N[block].to(dtype)).sum()
                if gradients.are_wanted:
                    logits_NV[block] = ce_gradient(model, row_labels_N[block], 1.0, shard)
            if gradients.are_wanted:
                gradients.add(rows, logits_NV, row_mask_N.to(dtype))
        gradients.keep(ctx)
        return ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor) -> tuple[Any, ...]:
        return (*Gradients.scaled(ctx, grad_ce), *[None] * 5)
