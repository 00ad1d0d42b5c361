"""Texts that grow token by token: keys and values of what they hold are kept, and a new token runs alone.

Rows of text stand side by side as the places of one sample, so every layout that trains can do it: sequence and context
parallelism split the rows, a pipeline takes them in as many micro-batches as it has stages. Each row has positions of
its own, from 0: where one text has ended, another begins in its row at any time.

Shape suffixes: B rows of this data-parallel rank, R rows of a micro-batch on this context-parallel rank, C tokens that
each row gets at once, S = R C, N heads, G groups of keys and values, T positions, D channels of a head, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from compactlm_nemo.models.attention import FUSED_KERNELS, SINK_CHANNELS
from compactlm_nemo.models.build import HiddenStateModel, ModelChunks
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.models.layout import context_positions
from compactlm_nemo.models.limits import longest_text
from compactlm_nemo.parallel.devices import device

KEYS_AT_A_TIME = 64
"""Positions by which the keys that are read grow; kernels take masks whose rows are a multiple of 16."""


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the tokens of a micro-batch stand."""

    rows: slice
    """Rows of the kept keys."""
    positions_RC: Tensor
    masks: dict[int | None, Tensor]
    """Window of a layer, None without one -> `[R, 1, C, T]` for the keys that are read, 0 or -inf."""


class KeptKeys:
    """Keys and values of one layer, `[rows, G, T, D]`, and attention over them.

    With sinks there is a key before the first, which stands for them as in `attention.with_sinks`.
    """

    def __init__(self, decoding: Decoding, window: int | None, max_length: int) -> None:
        self._decoding, self._window, self._max_length = decoding, window, max_length
        self._kept: tuple[Tensor, Tensor] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, sinks_N: Tensor | None) -> Any:
        """Keep new keys and values, and return what the new queries read: `[S, 1, N D]`.

        Args:
            query: `[S, 1, N, D]`, the tokens of a row one after another.
            key: `[S, 1, G, D]`, as the value, whose D may be another.
            scale: Of the scores; None stands for 1 / sqrt(D).
            sinks_N: Sink of each head, or None.
        """
        places = self._decoding.now
        shape = places.positions_RC.shape
        q_RCND, k_RCGD, v_RCGD = (x[:, 0].unflatten(0, shape) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if sinks_N is not None:
            sinks_NC = F.pad((sinks_N / scale)[:, None].to(q_RCND.dtype), (0, SINK_CHANNELS - 1))
            q_RCND = torch.cat([q_RCND, sinks_NC.expand(*shape, -1, -1)], dim=-1)
            k_RCGD, v_RCGD = (F.pad(x, (0, SINK_CHANNELS)) for x in (k_RCGD, v_RCGD))
        mask_R1CT = places.masks[self._window]
        keys, values = self._with(k_RCGD, v_RCGD)
        num_keys = mask_R1CT.shape[-1]
        groups, each = k_RCGD.shape[2], q_RCND.shape[2] // k_RCGD.shape[2]
        # Heads that share keys stand as further queries, so that no key is copied for them.
        q_RGQD = q_RCND.unflatten(2, (groups, each)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask_R1QT = mask_R1CT[:, :, None].expand(-1, -1, each, -1, -1).flatten(2, 3)
        kernels: AbstractContextManager[None] = sdpa_kernel(FUSED_KERNELS) if query.is_cuda else nullcontext()
        with kernels:
            out_RGQD = F.scaled_dot_product_attention(
                q_RGQD, keys[:, :, :num_keys], values[:, :, :num_keys], attn_mask=mask_R1QT, scale=scale
            )
        out_RCGND = out_RGQD.unflatten(2, (each, shape[1])).permute(0, 3, 1, 2, 4)[..., : value.shape[-1]]
        return out_RCGND.reshape(query.shape[0], 1, -1)

    def _with(self, k_RCGD: Tensor, v_RCGD: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values, and return all of the micro-batch's rows."""
        first = self._decoding.num_sinks
        if self._kept is None:  # zeros, as what is masked must be finite
            rows = self._decoding.num_local_rows
            made = [x.new_zeros(rows, x.shape[2], self._max_length, x.shape[3]) for x in (k_RCGD, v_RCGD)]
            if first:
                made[0][:, :, 0, -SINK_CHANNELS] = 1
            self._kept = made[0], made[1]
        places = self._decoding.now
        rows_R1 = torch.arange(len(places.positions_RC), device=k_RCGD.device)[:, None]
        keys, values = (kept[places.rows] for kept in self._kept)
        keys[rows_R1, :, places.positions_RC + first] = k_RCGD
        values[rows_R1, :, places.positions_RC + first] = v_RCGD
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        if self._kept is not None:
            keys, values = (kept[rows.to(kept.device)] for kept in self._kept)
            self._kept = keys, values


class Decoding:
    """`Decoding` lets rows of text grow inside a `with` block: new tokens attend to all that stand before them.

    Args:
        model: In evaluation mode; nothing else may run it inside the block.
        num_rows: Texts at a time of this data-parallel rank; rounded up to what the layout can split.
        max_length: Most tokens of a text, `limits.longest_text` at most.
    """

    def __init__(self, model: ModelChunks, num_rows: int, max_length: int) -> None:
        mesh = model.mesh
        if max_length > longest_text(model.dims):
            raise ValueError(f"a text of {max_length} tokens is longer than {longest_text(model.dims)}.")
        self._model, self._num_batches = model, mesh.pp_size
        unit = math.lcm(2 * mesh.cp_size if mesh.cp_size > 1 else 1, mesh.cp_size * mesh.tp_size)
        self._unit = unit // mesh.cp_size
        self._own = -(-num_rows // (unit * mesh.pp_size)) * self._unit
        """Rows of a micro-batch on this context-parallel rank."""
        self.num_sinks = int(model.plain()[0].config.softmax_type == "learnable")
        self._max_length = -(-(max_length + self.num_sinks) // KEYS_AT_A_TIME) * KEYS_AT_A_TIME
        self._all_places: list[_Places] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Decoding:
        for chunk in self._model.plain():
            chunk.is_decoding = True
            self._hooks.append(self._own_angles(chunk))
        for layer in self._model.layers():
            layer.self_attention.core_attention.kept_keys = KeptKeys(self, _window(layer), self._max_length)
        return self

    def __exit__(self, *_: object) -> None:
        for chunk in self._model.plain():
            chunk.is_decoding = False
        for layer in self._model.layers():
            layer.self_attention.core_attention.kept_keys = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def _batch_rows(self) -> int:
        return self._own * self._model.mesh.cp_size

    @property
    def num_rows(self) -> int:
        """Rows of this data-parallel rank."""
        return self._batch_rows * self._num_batches

    @property
    def num_local_rows(self) -> int:
        """Those of them that this context-parallel rank has."""
        return self._own * self._num_batches

    def shrink(self, is_live_PB: Tensor) -> Tensor | None:
        """Drop rows without a text where a quarter of all can go, so that the others run faster.

        Args:
            is_live_PB: ``[P, B]``, whether a row of a data-parallel rank has a text; on the CPU, equal on every rank.
        Returns:
            ``[P, B']``, the former number of each row, on every rank; None where all stay.
        """
        mesh, before = self._model.mesh, self._blocks()
        most = int(is_live_PB[:, before].sum(dim=-1).max())
        own = max(self._unit, -(-most // self._unit) * self._unit)
        if 4 * own > 3 * self._own:
            return None
        live_first_PMCR = (~is_live_PB[:, before]).int().argsort(dim=-1, stable=True)[..., :own]
        numbers_PMCR = before.expand(len(is_live_PB), -1, -1, -1).gather(-1, live_first_PMCR)
        local_MR = live_first_PMCR[mesh.dp_rank, :, mesh.cp_rank] + torch.arange(self._num_batches)[:, None] * self._own
        for layer in self._model.layers():
            layer.self_attention.core_attention.kept_keys.keep(local_MR.flatten())
        self._own = own
        kept_PB = torch.empty(len(is_live_PB), self.num_rows, dtype=torch.long)
        kept_PB[:, self._blocks().flatten()] = numbers_PMCR.flatten(1)
        return kept_PB

    def _blocks(self) -> Tensor:
        """Return `[M, C, R]`, the numbers of the rows of each micro-batch on each context-parallel rank."""
        cp_size = self._model.mesh.cp_size
        of_batch_CR = torch.stack([context_positions(self._own, rank, cp_size) for rank in range(cp_size)])
        return of_batch_CR + torch.arange(self._num_batches)[:, None, None] * self._batch_rows

    def _own_angles(self, chunk: HiddenStateModel) -> Any:
        """Let a chunk's rotary embedding give the angles of each token's position in its row."""
        rotary = chunk.rotary_pos_emb
        if chunk.rotations is not None:
            rotary.inv_freq = chunk.rotations[1]
        table = rotary(self._max_length, packed_seq=True)  # of one kind of layers or two: the positions are dim -4
        return rotary.register_forward_hook(
            lambda *_: table.index_select(-4, self.now.positions_RC.flatten().to(table.device))
        )

    def extend(self, tokens_BC: Tensor, starts_B: Tensor, visit: Callable[[Tensor, Tensor], None]) -> None:
        """Run C further tokens of every row. Collective.

        A position may be written again: later tokens read what was written last, up to their own position.

        Args:
            tokens_BC: ``[B, C]`` int64, equal on every rank that shares this data-parallel rank's model.
            starts_B: ``[B]`` int64, position of each row's first new token.
            visit: The last stage calls it with ``[R]``, row numbers on the CPU, and ``[R, C, H]`` hidden states, for
                every micro-batch; rows of other context-parallel ranks are shown there.
        """
        mesh, num = self._model.mesh, tokens_BC.shape[1]
        numbers = list(self._blocks()[:, mesh.cp_rank])
        num_keys = -(-(int(starts_B.max()) + num + self.num_sinks) // KEYS_AT_A_TIME) * KEYS_AT_A_TIME
        self._all_places = [self._places(idx, starts_B[rows_R], num, num_keys) for idx, rows_R in enumerate(numbers)]

        def show(idx: int, hidden_S1H: Tensor) -> None:
            visit(numbers[idx], hidden_S1H[:, 0].unflatten(0, (self._own, num)))

        batches = [rows_RC.reshape(1, -1).to(device()) for rows_RC in tokens_BC.split(self._batch_rows)]
        forward_each(self._model, batches, show, self._begin)

    def _begin(self, idx: int | None) -> None:
        """Take notice of the micro-batch that a chunk starts; one that fills the schedule repeats the last."""
        self.now = self._all_places[-1 if idx is None else idx]

    def _places(self, idx: int, starts_R: Tensor, num: int, num_keys: int) -> _Places:
        positions_RC = (starts_R[:, None] + torch.arange(num)).to(device())
        keys_T = torch.arange(num_keys, device=positions_RC.device) - self.num_sinks
        distance_RCT = positions_RC[..., None] - keys_T
        dtype, masks = self._model.plain()[0].config.params_dtype, {}
        for window in {_window(layer) for layer in self._model.layers()}:
            attends = distance_RCT >= 0
            if window is not None:
                attends &= distance_RCT < window
            attends[..., : self.num_sinks] = True
            masks[window] = torch.zeros_like(attends, dtype=dtype).masked_fill_(~attends, -torch.inf)[:, None]
        return _Places(slice(idx * self._own, (idx + 1) * self._own), positions_RC, masks)


def _window(layer: Any) -> int | None:
    """Return how many tokens a layer sees, itself included; None: all."""
    config = layer.config
    is_local = config.local_layers is None or config.local_layers[layer.layer_number - 1]
    return config.window_size[0] + 1 if config.window_size and is_local else None
