"""Second moments ``C = sum over tokens of x x^T`` of what goes into a layer's linear maps, for refitting cut weights.

Names, layers 0-based and global::

    layers.{i}.proj             [heads * d, heads * d]   input of the attention output projection
    layers.{i}.mlp              [F, F]                   input of fc2 of a dense MLP
    layers.{i}.shared_expert    [F, F]                   input of fc2 of the expert that sees every token
    layers.{i}.attention_norm   [H, H]                   output of the norm before attention
    layers.{i}.mlp_norm         [H, H]                   output of the norm before the MLP
    final_norm                  [H, H]

    layers.{i}.experts.{e}      [F, F]                   input of fc2 of a routed expert, its gate's weight included

Those of routed experts are over the tokens that the router sent there, and kept on request only: there are E of them a
layer.

Each tensor-parallel rank keeps its rows and never gathers the others'. The product of a micro-batch is float32 and is
added to a float32 total, so entry ij is off by at most about `3e-8 sqrt(C_ii C_jj)` a micro-batch (when all round the
same way, as constant activations do; else below 1e-6 in all): 1e-5 after 256 of them, which is 1024 samples on one
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
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.importance.experts import TokenPlaces
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.checkpoint import read_box
from compactlm_nemo.models.checkpoint_metadata import read_metadata
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum, barrier
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.parallel.world import is_main_rank

TOKENS = "tokens"
FINAL_NORM = "final_norm"


def proj_key(layer_idx: int) -> str:
    return f"layers.{layer_idx}.proj"


def mlp_key(layer_idx: int) -> str:
    return f"layers.{layer_idx}.mlp"


def shared_expert_key(layer_idx: int) -> str:
    return f"layers.{layer_idx}.shared_expert"


def expert_key(layer_idx: int, expert: int) -> str:
    return f"layers.{layer_idx}.experts.{expert}"


def attention_norm_key(layer_idx: int) -> str:
    return f"layers.{layer_idx}.attention_norm"


def mlp_norm_key(layer_idx: int) -> str:
    return f"layers.{layer_idx}.mlp_norm"


def own_rows(size: int, mesh: Mesh) -> slice:
    """Rows of a `[size, size]` matrix that this tensor-parallel rank keeps.

    Every size divides: the tensor-parallel size divides heads and MLP width, and heads divide the hidden size.
    """
    share = size // mesh.tp_size
    return slice(mesh.tp_rank * share, (mesh.tp_rank + 1) * share)


def holders(name: str, mesh: Mesh) -> ProcessGroup:
    """The ranks that add to the same rows of a moment."""
    return mesh.expert_dp_group if ".experts." in name else mesh.dp_cp_group


@torch.no_grad()
def add_outer(total_RE: Tensor, own_NR: Tensor, whole_NE: Tensor) -> None:
    """``total += own^T whole`` over N tokens in float32; changes `total_RE`."""
    # Not in one operation, which would add every few tokens to the large total and round as often.
    total_RE += own_NR.to(total_RE.dtype).T @ whole_NE.to(total_RE.dtype)


class MomentCollector:
    """Hooks that add up this rank's rows of every moment of its chunks; other hooks may run in the same passes.

    Only the samples that `on_batch` announces count, none before its first call.
    """

    def __init__(self, chunks: ModelChunks, mesh: Mesh, dims: Dims, *, experts: bool = False) -> None:
        self.mesh = mesh
        self.counted_rows = 0
        self.counted_of_group = torch.zeros(1)
        """`counted_rows` of every rank of the expert-parallel group, where experts are measured."""
        self.blocks: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        for layer in chunks.layers():
            idx = layer.layer_number - 1
            self._on_input(layer.self_attention.linear_proj, proj_key(idx), dims.num_heads * dims.head_dim)
            if not dims.num_experts:
                self._on_input(layer.mlp.linear_fc2, mlp_key(idx), dims.ffn_hidden_size)
            elif dims.shared_expert_ffn:
                fc2 = layer.mlp.shared_experts.linear_fc2
                self._on_input(fc2, shared_expert_key(idx), dims.shared_expert_ffn)
            if dims.num_experts and experts:
                self._on_experts(layer.mlp, idx, dims.ffn_hidden_size)
            self._on_norm(layer.input_layernorm, attention_norm_key(idx), dims.hidden_size)
            self._on_norm(layer.pre_mlp_layernorm, mlp_norm_key(idx), dims.hidden_size)
        if chunks[-1].post_process:
            self._on_norm(chunks[-1].decoder.final_layernorm, FINAL_NORM, dims.hidden_size)

    def on_batch(self, counted_rows: int) -> None:
        """Before a chunk runs a micro-batch: how many of its samples count, the leading ones; 0 for a filler."""
        self.counted_rows = counted_rows

    def state(self) -> dict[str, Tensor]:
        """This rank's own totals, which further batches change: store them first. They belong to this layout."""
        return dict(self.blocks)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave to the same rank of the same layout, to the same bits."""
        shapes = {name: tuple(block.shape) for name, block in self.blocks.items()}
        stored = {name: tuple(block.shape) for name, block in state.items()}
        if shapes != stored:
            raise CheckpointError(
                "the stored second moments are of another model or layout; continue with the same `parallel` settings."
            )
        for name, block in self.blocks.items():
            block.copy_(state[name])

    def reduce(self) -> dict[str, Tensor]:
        """Own rows over all samples, on the CPU; ends the collection. Collective.

        One block at a time is summed over data- and context-parallel ranks and given up.
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
        """Of a linear layer that is split by columns: `[S, B, E / tp]` of whole sequences."""

        def add(x_SBE: Tensor) -> None:
            whole_SBE = all_gather(x_SBE, self.mesh.tp_group, dim=-1) if self.mesh.tp_size > 1 else x_SBE
            add_outer(self.blocks[name], x_SBE.flatten(0, 1), whole_SBE.flatten(0, 1))

        self._allocate(name, size)
        self.handles.append(module.register_forward_pre_hook(lambda _, args: self._counted(args[0], add)))

    def _on_norm(self, module: Any, name: str, size: int) -> None:
        """Of a norm, `[S, B, H]`: every rank has all channels, under sequence parallelism of its own tokens."""
        rows = own_rows(size, self.mesh)

        def add(x_SBH: Tensor) -> None:
            whole_SBH = all_gather(x_SBH, self.mesh.tp_group, dim=0) if self.mesh.is_sequence_parallel else x_SBH
            whole_NH = whole_SBH.flatten(0, 1)
            add_outer(self.blocks[name], whole_NH[:, rows], whole_NH)

        self._allocate(name, size)
        self.handles.append(module.register_forward_hook(lambda _, args, out: self._counted(out, add)))

    def _on_experts(self, moe: Any, layer_idx: int, size: int) -> None:
        """Of each expert of this rank: tokens of all ranks of its expert-parallel group, those that count."""
        place = TokenPlaces(self.mesh, moe)
        self.handles += [*place.follow(), moe.experts.register_forward_pre_hook(self._count_group)]
        for local, expert in enumerate(moe.experts.local_experts):
            name = expert_key(layer_idx, moe.local_expert_indices[local])
            self._allocate(name, size)
            hook = partial(self._add_routed, place, local, name)
            self.handles.append(expert.linear_fc2.register_forward_pre_hook(hook))

    def _count_group(self, *_: Any) -> None:
        """Each rank of the group has its own number of samples that count; experts run in step on all of them."""
        own = torch.tensor([self.counted_rows], device=device())
        self.counted_of_group = all_gather(own, self.mesh.ep_group, dim=0)

    def _add_routed(self, place: TokenPlaces, local: int, name: str, _: Any, args: tuple[Tensor, ...]) -> None:
        sample_N = place.samples[local]
        batch = place.shape[1]
        x_NE = args[0].detach()[sample_N % batch < self.counted_of_group[sample_N // batch]]
        whole_NE = all_gather(x_NE, self.mesh.tp_group, dim=-1) if self.mesh.tp_size > 1 else x_NE
        add_outer(self.blocks[name], x_NE, whole_NE)

    def _allocate(self, name: str, size: int) -> None:
        rows = own_rows(size, self.mesh)
        self.blocks[name] = torch.zeros(rows.stop - rows.start, size, dtype=torch.float32, device=device())

    def _counted(self, x_SBE: Tensor, add: Callable[[Tensor], None]) -> None:
        # A rank's tensor-parallel neighbours have the same samples, so that all of them gather or none.
        if self.counted_rows:
            add(x_SBE.detach()[:, : self.counted_rows])


def save_moments(folder: Path, blocks: dict[str, Tensor], mesh: Mesh, tokens: int) -> None:
    """Write what `reduce` gave, over `tokens` calibration tokens, as one distributed checkpoint. Collective.

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
    """Reads second moments, whole or by rows, without process group."""

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
        """Calibration tokens that the sums are over."""
        return int(read_box(self.reader, self.metadata, TOKENS, [0], [1]))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`[stop - start, E]` float32 on the CPU."""
        if name not in self.sizes:
            raise CheckpointError(f"{self.reader.path} has no second moments {name}; are they of this model?")
        size = self.sizes[name]
        if not 0 <= start < stop <= size:
            raise ValueError(f"rows {start} to {stop} of {name} must be within its {size}.")
        return read_box(self.reader, self.metadata, name, [start, 0], [stop - start, size])

    def whole(self, name: str) -> Tensor:
        """`[E, E]` float32 on the CPU."""
        return self.rows(name, 0, self.sizes.get(name, 1))
