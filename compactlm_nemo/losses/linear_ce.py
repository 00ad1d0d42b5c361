"""Language-model loss from hidden states: full logits never exist, the vocabulary may be sharded.

Shape suffixes: N tokens, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactlm_nemo.config.loss import CROSS_ENTROPY
from compactlm_nemo.losses.linear_kd import check_tokens, linear_kd, masked
from compactlm_nemo.losses.targets import NoTargets, logit_arithmetic
from compactlm_nemo.losses.vocabulary import Head, at_least_float32, token_chunks


def linear_ce_sum(hidden_NH: Tensor, head: Head, labels_N: Tensor, mask_N: Tensor) -> Tensor:
    """Return the summed language-model loss in nats, computed chunk by chunk together with its gradient.

    ``sum_n mask_n * (log sum_v exp(z_nv) - z_n,label)`` with ``z = hidden @ weight.T`` over the unpadded vocabulary.
    The gradient to the logits is ``mask_n * (softmax(z)_nv - [v = label_n])``. It is ``linear_kd`` without a teacher.

    Args: as in ``linear_kd``, with the same gradients.
    Returns:
        Scalar, float32 or wider, equal on every rank that shares the vocabulary.
    """
    return linear_kd(hidden_NH, head, NoTargets(hidden_NH.shape[0]), labels_N, mask_N, loss=CROSS_ENTROPY).loss_sum


@torch.no_grad()
def linear_ce(hidden_NH: Tensor, head: Head, labels_N: Tensor, mask_N: Tensor) -> Tensor:
    """Return the language-model loss of each token in nats, without gradient.

    ``mask_n * (log sum_v exp(z_nv) - z_n,label)`` with ``z = hidden @ weight.T`` over the unpadded vocabulary.

    Args: as in ``linear_kd``.
    Returns:
        ``[N]``, float32 or wider, equal on every rank that shares the vocabulary; neither summed nor averaged.
    """
    check_tokens(hidden_NH, labels_N, mask_N)
    losses_N = torch.zeros(hidden_NH.shape[0], dtype=at_least_float32(hidden_NH), device=hidden_NH.device)
    arithmetic = logit_arithmetic(head.is_fused(hidden_NH))
    for rows in token_chunks(hidden_NH.shape[0], head.chunk_tokens):
        ce_N = arithmetic.token_losses(head.logits(hidden_NH[rows]), labels_N[rows], head.shard)
        losses_N[rows] = masked(ce_N, mask_N[rows])
    return losses_N
