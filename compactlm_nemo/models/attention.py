"""Attention of a layer by torch's fused kernels, and the mask that all layers of a micro-batch share.

Shape suffixes: B samples, S queries of this rank, T tokens of the whole sequence, N heads, G groups of keys and values,
D channels of a head, E channels of all heads of this rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel

from compactlm_nemo.models.layout import context_positions, gathered_positions
from compactlm_nemo.parallel.collectives import all_gather

FUSED_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Kernels that never write the scores `[B, N, S, T]` to memory; torch itself would choose one that does where none of
these takes the input, 8 GiB a layer at 8,192 tokens."""


SINK_CHANNELS = 8
"""Channels that a sink adds to a head, one and those that nobody uses: bf16 kernels take multiples of 8."""
SINK_KEYS = 16
"""Keys that sinks add behind the others of a mask, one and those that nobody sees: torch copies, in every layer, a mask
whose rows are no multiple of 16."""


class SdpaCoreAttention(MegatronModule):
    """Attention by `scaled_dot_product_attention`, causal unless the model brings a mask; its scale is the config's.

    query `[s, b, heads, d]`, key and value `[s, b, groups, d]` of this TP rank; returns `[s, b, heads * d]`. Under
    context parallelism s is this rank's part of the sequence (`context_positions`); keys and values are gathered in the
    order of the ranks, and their gradients summed back to the ranks they came from. The mask, `[b or 1, 1, s, whole
    sequence]`, is 0 where a token attends and -inf elsewhere. On CUDA only `FUSED_KERNELS` run, or torch raises.

    With sinks a head's softmax is ``exp(s_t) / (exp(sink) + sum over t of exp(s_t))``; then the mask has the columns of
    `SINK_KEYS` keys behind the others. `softmax_offset` `[heads]` is Megatron's name of the sinks of this rank.

    While texts grow token by token, `kept_keys` attends in its place (`decoding.KeptKeys`).
    """

    def __init__(self, config: TransformerConfig, *_: object, pg_collection: Any = None, **__: object) -> None:
        super().__init__(config=config)
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.kept_keys: Any = None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            self.softmax_offset.tensor_model_parallel = True  # type: ignore[attr-defined]  # or norms of gradients drop it

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *_: object, **__: object
    ) -> Tensor:
        if self.kept_keys is not None:
            read: Tensor = self.kept_keys.attend(
                query, key, value, scale=self.config.softmax_scale, sinks_N=self.softmax_offset
            )
            return read
        if self.cp_group is not None:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        q_BNSD, k_BGTD, v_BGTD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        scale, num_channels = self.config.softmax_scale, q_BNSD.shape[-1]
        if self.softmax_offset is not None:
            scale = num_channels**-0.5 if scale is None else scale
            is_masked = attention_mask is not None
            q_BNSD, k_BGTD, v_BGTD = with_sinks(
                q_BNSD, k_BGTD, v_BGTD, self.softmax_offset / scale, is_masked=is_masked
            )
        if q_BNSD.is_cuda and (attention_mask is not None or q_BNSD.dtype is torch.float32):
            # Kernels that take masks or float32 take no groups.
            k_BGTD, v_BGTD = (for_each_head(x_BGTD, q_BNSD.shape[1]) for x_BGTD in (k_BGTD, v_BGTD))
        kernels: AbstractContextManager[None] = sdpa_kernel(FUSED_KERNELS) if q_BNSD.is_cuda else nullcontext()
        with kernels:
            out_BNSD = F.scaled_dot_product_attention(
                q_BNSD,
                k_BGTD,
                v_BGTD,
                attn_mask=attention_mask,
                is_causal=attention_mask is None,
                scale=scale,
                enable_gqa=q_BNSD.shape[1] != k_BGTD.shape[1],
            )
        if self.softmax_offset is not None:
            out_BNSD = out_BNSD[:, :, -query.shape[0] :, :num_channels]
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Tell Megatron's checkpoints that ranks have the sinks of different heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets
        )


def with_sinks(
    q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, sinks_N: Tensor, *, is_masked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of which one key stands for the sinks: its product with a query is ``sink``.

    Queries get a channel with their head's sink, and keys one that is 1 for the sink's key, which has no value, and 0
    for all others. So any kernel of `scaled_dot_product_attention` takes it, for heads that share keys, and gives its
    gradient. A sink in the mask would need a mask for each head, which has the size of the scores; what the kernels
    know of their denominators (out times ``sigmoid(logsumexp - sink)``) is given by private operators of torch alone,
    others for each kernel.

    Args:
        sinks_N: Divided by the attention's scale.
        is_masked: Whether there is a mask, with columns of `SINK_KEYS` keys behind the others. Without one the sink is
            the first key, and a query before the first keeps the diagonal in its place.
    """
    sinks_NC = F.pad(sinks_N[:, None].to(q_BNSD.dtype), (0, SINK_CHANNELS - 1))
    sinks_BNSC = sinks_NC[:, None].expand(*q_BNSD.shape[:-1], SINK_CHANNELS)
    q_BNSD = torch.cat([q_BNSD, sinks_BNSC], dim=-1)
    count = SINK_KEYS if is_masked else 1
    sink_TD = F.pad(k_BGTD.new_ones(1, 1), (k_BGTD.shape[-1], SINK_CHANNELS - 1, 0, count - 1))
    sink_BGTD = sink_TD.expand(*k_BGTD.shape[:2], -1, -1)
    k_BGTD, v_BGTD = (F.pad(x_BGTD, (0, SINK_CHANNELS)) for x_BGTD in (k_BGTD, v_BGTD))
    if is_masked:
        return q_BNSD, torch.cat([k_BGTD, sink_BGTD], dim=2), F.pad(v_BGTD, (0, 0, 0, count))
    return F.pad(q_BNSD, (0, 0, 1, 0)), torch.cat([sink_BGTD, k_BGTD], dim=2), F.pad(v_BGTD, (0, 0, 1, 0))


def for_each_head(x_BGTD: Tensor, num_heads: int) -> Tensor:
    """Return `[B, num_heads, T, D]`: the key or value of each query head, which neighbouring heads share."""
    return x_BGTD.repeat_interleave(num_heads // x_BGTD.shape[1], dim=1)


class NormOverHeads(MegatronModule):
    """RMSNorm over the channels of all heads together, of which this tensor-parallel rank has `num_heads`.

    ``w x / sqrt(mean(x^2) + eps)``, x `[s, b, heads, d]`, statistics at least float32, the mean over the heads of all
    ranks; w `[heads * d]` of this rank. The mean's gradient is summed over the ranks, as each uses it on its heads.
    """

    def __init__(self, config: TransformerConfig, num_heads: int, tp_group: ProcessGroup) -> None:
        super().__init__(config=config)
        width = num_heads * config.kv_channels
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]  # or the gradient norm drops it
        self.tp_group, self.num_channels = tp_group, width * tp_group.size()

    def forward(self, x_SBND: Tensor) -> Tensor:
        x_SBE = x_SBND.flatten(-2).to(torch.promote_types(x_SBND.dtype, torch.float32))
        squares_SB1 = x_SBE.square().sum(dim=-1, keepdim=True)
        if self.tp_group.size() > 1:
            squares_SB1 = reduce_from_tensor_model_parallel_region(squares_SB1, group=self.tp_group)
            squares_SB1 = copy_to_tensor_model_parallel_region(squares_SB1, group=self.tp_group)
        normed_SBE = x_SBE * (squares_SB1 / self.num_channels + self.config.layernorm_epsilon).rsqrt()
        return (self.weight * normed_SBE).to(x_SBND.dtype).view_as(x_SBND)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Tell Megatron's checkpoints that ranks have different heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class NormedOverHeads(SelfAttention):
    """Attention with a `NormOverHeads` of queries and one of keys; Megatron's own norms know one head at a time."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        tp_group = self.pg_collection.tp
        self.query_norm = NormOverHeads(config, self.num_attention_heads_per_partition, tp_group)
        self.key_norm = NormOverHeads(config, self.num_query_groups_per_partition, tp_group)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        return self.query_norm(query), self.key_norm(key), *others


class LocalOrGlobalAttention(SelfAttention):
    """Attention of a layer that is local or not (`Dims.local_layers`): of masks and rotations it takes its own.

    Both come in one tensor, first what global layers take and then what local ones do, so that layers may be recomputed
    and sent through a pipeline as all others. Rotations do where local layers have a theta of their own.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kind = int(self.config.local_layers[self.layer_number - 1])
        if attention_mask is not None:
            attention_mask = attention_mask[kind]
        if rotary_pos_emb is not None and self.config.has_local_theta:
            rotary_pos_emb = rotary_pos_emb[kind]
        return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)


class AttentionMask:
    """What each token attends to, of one model chunk: documents, a sliding window and context parallelism decide it.

    Args:
        config: Sizes, window and number format of the chunk.
        cp_group: Ranks that hold the other parts of each sequence.
    """

    def __init__(self, config: TransformerConfig, cp_group: ProcessGroup) -> None:
        self.cp_size, self.cp_group, self.dtype = config.context_parallel_size, cp_group, config.params_dtype
        self.window: int | None = config.window_size[0] + 1 if config.window_size else None
        self.windows = [self.window] if config.local_layers is None else [None, self.window]
        """One, or that of global layers and that of local ones."""
        self.has_sinks = config.softmax_type == "learnable"
        self._made: tuple[object, Tensor] | None = None

    def __call__(self, tokens_BS: Tensor, document_end: int | None) -> Tensor | None:
        """Return `[B or 1, 1, S, T]` in the model's dtype, 0 where a token attends and -inf elsewhere.

        None where every token attends to all before it. A mask that does not depend on the tokens is made once for a
        length and kept. Where layers are local or global, `[2, B or 1, 1, S, T]` for `LocalOrGlobalAttention`.
        """
        length = tokens_BS.shape[1]
        has_window = self.window is not None and self.window < length * self.cp_size
        if document_end is not None:
            places = self._places(length, tokens_BS.device)
            return self._additive(self._positions(*places) & self._documents(tokens_BS, document_end, *places))
        if self.cp_size == 1 and not has_window:
            return None
        key = (length, tokens_BS.device)
        if self._made is None or self._made[0] != key:
            self._made = key, self._additive(self._positions(*self._places(*key)))
        return self._made[1]

    def _additive(self, attends: Tensor) -> Tensor:
        """Turn true and false into what is added to the scores; torch would do it again in every layer."""
        mask = torch.zeros_like(attends, dtype=self.dtype).masked_fill_(~attends, -torch.inf)
        if not self.has_sinks:
            return mask
        rows = mask.shape[:-1]
        return torch.cat([mask, mask.new_zeros(*rows, 1), mask.new_full((*rows, SINK_KEYS - 1), -torch.inf)], dim=-1)

    def _places(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return places in the sequence, `[S]` of this rank's queries and `[T]` of the gathered keys."""
        rank = self.cp_group.rank() if self.cp_size > 1 else 0
        queries_S = context_positions(length, rank, self.cp_size, device)
        return queries_S, gathered_positions(length, self.cp_size, device)

    def _positions(self, queries_S: Tensor, keys_T: Tensor) -> Tensor:
        """Return `[1, 1, S, T]`, true where a token's place allows it to attend; `[2, 1, 1, S, T]` for two windows."""
        past_ST = keys_T <= queries_S[:, None]
        masks = [
            past_ST if window is None else past_ST & (keys_T > queries_S[:, None] - window) for window in self.windows
        ]
        return (torch.stack(masks) if len(masks) > 1 else masks[0])[..., None, None, :, :]

    def _documents(self, tokens_BS: Tensor, document_end: int, queries_S: Tensor, keys_T: Tensor) -> Tensor:
        """Return `[B, 1, S, T]`, true where two tokens are of one document."""
        begins_BT = tokens_BS == document_end
        if self.cp_size > 1:
            begins_BT = all_gather(begins_BT, self.cp_group, dim=1)[:, keys_T.argsort()]
        document_BT = begins_BT.cumsum(dim=1)
        return document_BT[:, None, queries_S, None] == document_BT[:, None, None, keys_T]
