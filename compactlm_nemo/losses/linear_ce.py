"""Language-model loss from hidden states: full logits never exist, the vocabulary may be sharded.

Shape suffixes: N tokens, V vocabulary rows of this rank, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from compactlm_nemo.config.loss import CROSS_ENTROPY
from compactlm_nemo.losses.linear_kd import check_tokens, linear_kd, masked
from compactlm_nemo.losses.targets import NoTargets
from compactlm_nemo.losses.vocabulary import VocabShard, blocks, chunks, wide


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
    The gradient to the logits is ``mask_n * (softmax(z)_nv - [v = label_n])``. It is ``linear_kd`` without a teacher.

    Args: as in ``linear_kd``, with the same gradients.
    Returns:
        Scalar, float32 or wider, equal on every rank of ``tp_group``.
    """
    return linear_kd(
        hidden_NH, weight_VH, NoTargets(hidden_NH.shape[0]), labels_N, mask_N, loss=CROSS_ENTROPY,
        chunk_tokens=chunk_tokens, vocab_size=vocab_size, vocab_start=vocab_start, tp_group=tp_group,
    ).loss_sum  # fmt: skip


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
    shard = VocabShard(vocab_size, vocab_start, tp_group)
    out_N = torch.zeros(hidden_NH.shape[0], dtype=wide(hidden_NH), device=hidden_NH.device)
    for rows in chunks(hidden_NH.shape[0], chunk_tokens):
        logits_NV = shard.logits(hidden_NH[rows], weight_VH)
        for block in blocks(logits_NV, shard):
            (model,) = shard.log_probs([logits_NV[block]], labels_N[rows][block], 1.0)
            out_N[rows][block] = masked(model.ce_N, mask_N[rows][block])
    return out_N
