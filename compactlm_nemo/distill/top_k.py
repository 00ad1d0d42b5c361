"""A teacher's likeliest tokens, from hidden states and a head whose vocabulary may be sharded.

Shape suffixes: N tokens, V vocabulary rows of this rank, G teacher width, K entries kept, R ranks of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactlm_nemo.distill.targets import TopK
from compactlm_nemo.distill.vocabulary import Shard, chunks
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum


@torch.no_grad()
def top_k_targets(
    hidden_NG: Tensor, weight_VG: Tensor, labels_N: Tensor, *, k: int, chunk_tokens: int, shard: Shard
) -> TopK:
    """The k likeliest tokens of each position, likeliest first, and the probability of all others.

    Args:
        hidden_NG: ``[N, G]``, replicated over ``shard.tp_group``.
        weight_VG: ``[V, G]``, this rank's rows.
        labels_N: ``[N]``, global ids, for the teacher's language-model loss.
        k: Entries kept, at most the vocabulary.
        chunk_tokens: Tokens whose logits exist at the same time.
    Returns:
        ``TopK`` at temperature 1, equal on every rank of the group.
    """
    parts = [
        _chunk(hidden_NG[rows], weight_VG, labels_N[rows], k, shard) for rows in chunks(len(hidden_NG), chunk_tokens)
    ]
    return TopK(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _chunk(hidden_NG: Tensor, weight_VG: Tensor, labels_N: Tensor, k: int, shard: Shard) -> TopK:
    (teacher,) = shard.log_probs([shard.logits(hidden_NG, weight_VG)], labels_N, 1.0)
    log_p_NV = teacher.log_prob_NV
    own = min(k, log_p_NV.shape[1])
    found = log_p_NV.topk(own, dim=-1)
    values_NK, ids_NK = found.values, found.indices + shard.vocab_start
    if shard.tp_group is not None:
        missing = k - own  # a rank with fewer rows than k still gives k, which nobody picks
        values_NK = torch.nn.functional.pad(values_NK, (0, missing), value=-torch.inf)
        values_NK = all_gather(values_NK, shard.tp_group, dim=-1)
        ids_NK = all_gather(torch.nn.functional.pad(ids_NK, (0, missing)), shard.tp_group, dim=-1)
        best = values_NK.topk(k, dim=-1)
        values_NK, ids_NK = best.values, ids_NK.gather(-1, best.indices)
    p_NV = teacher.prob_NV
    # Summed without the K entries: 1 minus their sum would cancel where the teacher is sure.
    rest_N = all_reduce_sum(shard.add_at(p_NV, ids_NK, -shard.at(p_NV, ids_NK)).sum(dim=-1), shard.tp_group)
    return TopK(ids_NK, values_NK.exp(), rest_N, teacher.ce_N)
