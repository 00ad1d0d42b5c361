"""Second moments ``C = sum over tokens of x x^T`` are kept of the inputs of linear maps, for refitting cut weights.

Names are those of the units that a map reads, layers 0-based and global (`importance.names`)::

    layers.{i}.heads               [heads * d, heads * d]   input of the attention output projection
    layers.{i}.mlp                 [F, F]                   input of fc2 of a dense MLP
    layers.{i}.shared_expert.mlp   [F, F]                   input of fc2 of the expert that sees every token
    layers.{i}.attention_norm      [H, H]                   output of the norm before attention
    layers.{i}.mlp_norm            [H, H]                   output of the norm before the MLP
    final_norm                     [H, H]

    layers.{i}.experts.{e}.mlp     [F, F]                   input of fc2 of a routed expert, its gate's weight included

Moments of routed experts are over the tokens that the router sent to the expert, and kept on request only: there are E
of them a layer.

Each tensor-parallel rank keeps its rows and never gathers the others'. The product of a micro-batch is float32 and is
added to a float32 total, so entry ij is off by at most about `3e-8 sqrt(C_ii C_jj)` a micro-batch (when all round in
one direction, as constant activations do; else below 1e-6 in all): 1e-5 after 256 of them, which is 1024 samples on one
rank. The error is relative to the two channels it belongs to, so massive activations do not harm the others, and it is
far below the ridge of a refit (1e-3). float64 totals would take twice the memory, `F^2` numbers a layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from compactlm_nemo.data.marks import counts_of, ids_of
from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.importance.experts import TokenPlaces
from compactlm_nemo.importance.names import (
    FINAL_NORM,
    attention_norm_key,
    expert_mlp_key,
    heads_key,
    mlp_key,
    mlp_norm_key,
    shared_expert_key,
)
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.checkpoint import read_box
from compactlm_nemo.models.checkpoint_metadata import read_metadata
from compactlm_nemo.models.forward import sequence_share
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum, barrier
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.parallel.world import is_main_rank

TOKENS = "tokens"
"""Name of the number of calibration tokens in the file."""


def rows_of_rank(size: int, mesh: Mesh) -> slice:
    """Return the rows of a `[size, size]` matrix that this tensor-parallel rank keeps.

    The division leaves no rest: the tensor-parallel size divides heads and MLP width, and heads divide the hidden size.
    """
    num = size // mesh.tp_size
    return slice(mesh.tp_rank * num, (mesh.tp_rank + 1) * num)


def holders(name: str, mesh: Mesh) -> ProcessGroup:
    """Return the ranks that add to one set of rows of a moment."""
    return mesh.expert_dp_group if ".experts." in name else mesh.dp_cp_group


@torch.no_grad()
def add_outer(total_RE: Tensor, rows_NR: Tensor, whole_NE: Tensor) -> None:
    """Add ``rows^T whole`` over N tokens to `total_RE`, in place and in float32."""
    # Not in one operation, which would add every few tokens to the large total and round as often.
    total_RE += rows_NR.to(total_RE.dtype).T @ whole_NE.to(total_RE.dtype)


class MomentCollector:
    """Hooks add up this rank's rows of every moment of its chunks; other hooks may run in these passes.

    Only the samples that `on_batch` announces count, none before the first call of `on_batch`.
    """

    def __init__(self, chunks: ModelChunks, *, experts: bool = False) -> None:
        mesh, dims = chunks.mesh, chunks.dims
        self.mesh = mesh
        self.counted_rows = 0
        self.counts_SB: Tensor | None = None
        """Which tokens of the micro-batch count, on this context-parallel rank; None for all."""
        self.counted_of_group = torch.zeros(1)
        """`counted_rows` of every rank of the expert-parallel group, where experts are measured."""
        self.blocks: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        for layer in chunks.layers():
            idx = layer.layer_number - 1
            self._on_input(layer.self_attention.linear_proj, heads_key(idx), dims.num_heads * dims.head_dim)
            has_experts = not dims.is_dense(idx)
            if not dims.num_experts:  # of dense layers among others no refit asks
                self._on_input(layer.mlp.linear_fc2, mlp_key(idx), dims.ffn_hidden_size)
            elif has_experts and dims.shared_expert_ffn:
                fc2 = layer.mlp.shared_experts.linear_fc2
                self._on_input(fc2, shared_expert_key(idx), dims.shared_expert_ffn)
            if has_experts and experts:
                self._on_experts(layer.mlp, idx, dims.ffn_hidden_size)
            self._on_norm(layer.input_layernorm, attention_norm_key(idx), dims.hidden_size)
            self._on_norm(layer.pre_mlp_layernorm, mlp_norm_key(idx), dims.hidden_size)
        if chunks[-1].post_process:
            self._on_norm(chunks[-1].decoder.final_layernorm, FINAL_NORM, dims.hidden_size)

    def on_batch(self, counted_rows: int, counts_SB: Tensor | None = None) -> None:
        """Set how many samples of the next micro-batch count, the leading ones; 0 for one that fills the schedule.

        `counts_SB` says which of their tokens do, None for all.
        """
        self.counted_rows, self.counts_SB = counted_rows, counts_SB

    def state(self) -> dict[str, Tensor]:
        """Return this rank's totals, for this layout only; they are no copies, further batches change them."""
        return dict(self.blocks)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from the state that this rank gave in this layout, without a change of any bit."""
        shapes = {name: tuple(block.shape) for name, block in self.blocks.items()}
        stored = {name: tuple(block.shape) for name, block in state.items()}
        if shapes != stored:
            raise CheckpointError(
                "the stored second moments are of another model or layout; continue with the same `parallel` settings."
            )
        for name, block in self.blocks.items():
            block.copy_(state[name])

    def reduce(self) -> dict[str, Tensor]:
        """Sum this rank's rows over all samples, on the CPU, and end the collection. Collective.

        One block at a time is summed over data- and context-parallel ranks and freed.
        """
        self.remove()
        reduced: dict[str, Tensor] = {}
        for name in list(self.blocks):
            reduced[name] = all_reduce_sum(self.blocks.pop(name), holders(name, self.mesh)).cpu()
        return reduced

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _on_input(self, module: Any, name: str, size: int) -> None:
        """Hook the input of a linear layer that is split by columns: `[S, B, E / tp]` of whole sequences."""

        def add(x_SBE: Tensor) -> None:
            whole_SBE = all_gather(x_SBE, self.mesh.tp_group, dim=-1) if self.mesh.tp_size > 1 else x_SBE
            add_outer(self.blocks[name], self._weighted(x_SBE), whole_SBE.flatten(0, 1))

        self._allocate(name, size)
        self.handles.append(module.register_forward_pre_hook(lambda _, args: self._counted(args[0], add)))

    def _on_norm(self, module: Any, name: str, size: int) -> None:
        """Hook the output of a norm, `[S, B, H]`: all channels, under sequence parallelism of this rank's tokens."""
        rows = rows_of_rank(size, self.mesh)

        def add(x_SBH: Tensor) -> None:
            whole_SBH = all_gather(x_SBH, self.mesh.tp_group, dim=0) if self.mesh.is_sequence_parallel else x_SBH
            add_outer(self.blocks[name], self._weighted(whole_SBH[..., rows]), whole_SBH.flatten(0, 1))

        self._allocate(name, size)
        self.handles.append(module.register_forward_hook(lambda _, args, out: self._counted(out, add)))

    def _on_experts(self, moe: Any, layer_idx: int, size: int) -> None:
        """Hook each expert of this rank: its tokens come from the whole expert-parallel group, and some count."""
        places = TokenPlaces(self.mesh, moe, self._part_counts)
        self.handles += [*places.follow(), moe.experts.register_forward_pre_hook(self._count_group)]
        for local, expert in enumerate(moe.experts.local_experts):
            name = expert_mlp_key(layer_idx, moe.local_expert_indices[local])
            self._allocate(name, size)
            hook = partial(self._add_routed, places, local, name)
            self.handles.append(expert.linear_fc2.register_forward_pre_hook(hook))

    def _part_counts(self) -> Tensor | None:
        return None if self.counts_SB is None else sequence_share(self.counts_SB, self.mesh)

    def _count_group(self, *_: Any) -> None:
        """Gather how many samples of each rank of the group count; experts run in step on the tokens of all ranks."""
        counted = torch.full((1,), self.counted_rows, device=device())
        self.counted_of_group = all_gather(counted, self.mesh.ep_group, dim=0)

    def _add_routed(self, places: TokenPlaces, local: int, name: str, _: Any, args: tuple[Tensor, ...]) -> None:
        marked_N, batch = places.samples[local], places.shape[1]
        sample_N = ids_of(marked_N)
        counts_N = (sample_N % batch < self.counted_of_group[sample_N // batch]) & counts_of(marked_N)
        x_NE = args[0].detach()[counts_N]
        whole_NE = all_gather(x_NE, self.mesh.tp_group, dim=-1) if self.mesh.tp_size > 1 else x_NE
        add_outer(self.blocks[name], x_NE, whole_NE)

    def _allocate(self, name: str, size: int) -> None:
        rows = rows_of_rank(size, self.mesh)
        self.blocks[name] = torch.zeros(rows.stop - rows.start, size, dtype=torch.float32, device=device())

    def _weighted(self, x_SBE: Tensor) -> Tensor:
        """Return `[N, E]` with 0 for tokens that do not count, of the samples that do."""
        if self.counts_SB is not None:
            x_SBE = x_SBE.masked_fill(~self.counts_SB[:, : self.counted_rows, None], 0)
        return x_SBE.flatten(0, 1)

    def _counted(self, x_SBE: Tensor, add: Callable[[Tensor], None]) -> None:
        # A rank's tensor-parallel neighbours have the same samples, so that all of them gather or none.
        if self.counted_rows:
            add(x_SBE.detach()[:, : self.counted_rows])


def save_moments(folder: Path, blocks: dict[str, Tensor], mesh: Mesh, tokens: int) -> None:
    """Write the sums of `reduce` over `tokens` calibration tokens as one distributed checkpoint. Collective.

    The file belongs to the model and not to the layout. `folder` is replaced.
    """
    if is_main_rank():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    barrier()
    state = {
        name: ShardedTensor.from_rank_offsets(
            name, block, (0, mesh.tp_rank, mesh.tp_size), replica_id=holders(name, mesh).rank()
        )
        for name, block in blocks.items()
    }
    rank = (mesh.pp_rank, mesh.tp_rank, mesh.dp_cp_group.rank())
    state[TOKENS] = ShardedTensor.from_rank_offsets(TOKENS, torch.tensor([tokens]), replica_id=rank)
    dist_checkpointing.save(state, str(folder))


class MomentSource:
    """Reads second moments from a folder, whole or by rows, without process group."""

    def __init__(self, folder: Path) -> None:
        # Megatron writes this file last.
        if not (folder / "metadata.json").is_file():
            raise CheckpointError(f"{folder} holds no second moments; score with score.second_moments=true.")
        self.reader = FileSystemReader(folder)
        self.metadata = read_metadata(folder)
        self.sizes = {
            name: stored.size[0]
            for name, stored in self.metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and name != TOKENS
        }
        """Rows of each moment, by name."""

    @property
    def tokens(self) -> int:
        """The number of calibration tokens that the sums are over."""
        return int(read_box(self.reader, self.metadata, TOKENS, [0], [1]))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows `start` to `stop`, `[stop - start, E]` float32 on the CPU."""
        if name not in self.sizes:
            raise CheckpointError(f"{self.reader.path} has no second moments {name}; are they of this model?")
        size = self.sizes[name]
        if not 0 <= start < stop <= size:
            raise ValueError(f"rows {start} to {stop} of {name} must be within its {size}.")
        return read_box(self.reader, self.metadata, name, [start, 0], [stop - start, size])

    def whole(self, name: str) -> Tensor:
        """Read a whole moment, `[E, E]` float32 on the CPU."""
        return self.rows(name, 0, self.sizes.get(name, 1))
