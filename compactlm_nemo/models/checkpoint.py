"""Megatron distributed checkpoints: saved and loaded on the mesh, or read parameter by parameter without one."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories, is_main_replica
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.utils.dlpack import from_dlpack

from compactlm_nemo.errors import CheckpointError, NumericsError
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.checkpoint_metadata import read_metadata
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER
from compactlm_nemo.models.outside import BLOCK_ROWS, refuse_other_head
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.models.source import WEIGHTS, find_weights
from compactlm_nemo.parallel.collectives import all_gather_objects
from compactlm_nemo.parallel.mesh import Mesh

_ANYTHING, _DATA_ALONE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Variables of the environment that `torch.load` reads at each call; it refuses both at once."""


def sharding_metadata(mesh: Mesh) -> dict[str, Any]:
    """Tell Megatron which ranks hold equal weights."""
    return {"dp_cp_group": mesh.dp_cp_group}


def model_state(chunks: ModelChunks) -> dict[str, Any]:
    """Return Megatron's sharded state of each chunk as `model{i}`; what is stored carries global layer numbers."""
    metadata = sharding_metadata(chunks.mesh)
    return {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks.plain())}


def load_state(chunks: ModelChunks, state: dict[str, Any]) -> None:
    """Put what `model_state` describes, once loaded, into the chunks."""
    for i, chunk in enumerate(chunks.plain()):
        chunk.load_state_dict(state[f"model{i}"], strict=True)


def save_model(folder: Path, chunks: ModelChunks, way_out: str = "mend what made it") -> None:
    """Save the model's shards under `folder/weights`; collective over all ranks.

    Raises:
        NumericsError: a weight is not finite; `way_out` ends the message.
    """
    state = model_state(chunks)
    if key := first_nonfinite(state):
        raise NumericsError(f"{key} holds NaN or infinity, so {folder} is not written; {way_out}.")
    target = folder / WEIGHTS
    target.mkdir(parents=True, exist_ok=True)
    own_storages(state)
    dist_checkpointing.save(state, str(target))


def own_storages(state: dict[str, Any], *, may_change: bool = False) -> None:
    """Let each tensor on the host that this rank writes be alone in its storage, in place.

    A file holds whole storages, so Megatron-Core copies every tensor that is a part of one, and all before it writes
    the first. Weights and moments are parts of their buffers, layers of their stack: that would be a second model.

    Args:
        state: Megatron's sharded state.
        may_change: Whether the model may change before the files are written. Then storages are copies, which a writer
            needs in any case, else they share the model's memory.
    """
    apply_factories(state)
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor) and shard.data.device.type == "cpu" and is_main_replica(shard.replica_id):
            data = shard.data.detach()
            shard.data = data.clone() if may_change else from_dlpack(data.contiguous())


def first_nonfinite(state: dict[str, Any]) -> str | None:
    """Return the key of a tensor of Megatron's sharded state, of any rank, that holds NaN or infinity. Collective."""
    shards = [shard for shard in shards_of(state) if shard.data is not None and shard.data.is_floating_point()]
    # The least and the greatest number tell, NaN included, and need no tensor of the shard's size.
    finite = torch.stack([torch.stack(shard.data.aminmax()).isfinite().all() for shard in shards]).cpu()  # one wait
    mine = next((_name(shard) for shard, is_finite in zip(shards, finite.tolist(), strict=True) if not is_finite), None)
    return next((name for name in all_gather_objects(mine) if name), None)


def shards_of(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Yield the tensors that Megatron stores for its sharded state, among which may be plain values."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from nested_values(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


def _name(shard: ShardedTensor) -> str:
    """Return a tensor's key, with its place where layers or experts are stacked under one key."""
    place = shard.global_offset[: shard.prepend_axis_num]
    return f"{shard.key}[{', '.join(map(str, place))}]" if place else shard.key


def load_shards(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what `state` describes from a distributed checkpoint, whose index is checked first. Collective."""
    stored = read_metadata(folder).state_dict_metadata  # Megatron's own reader would run whatever the index says
    for shard in shards_of(state):
        if isinstance(stored.get(shard.key), BytesStorageMetadata):  # torch would unpickle these
            raise CheckpointError(f"{folder} stores {shard.key} as an object and not as a tensor; do not use it.")
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            value.merge_fn = partial(_merged, value.data, value.merge_fn)
    with naming_damage(folder):
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    return loaded


def _merged(whole: Tensor, merge: Callable[[Any], Any], parts: Any) -> Any:
    """Return what was loaded as several tensors, such as gate and up: `whole`, if they are views of it, else a copy.

    Megatron-Core joins copies, and of all layers before the first is put into the model.
    """
    memory = whole.untyped_storage().data_ptr()
    is_there = all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == memory for x in nested_values(parts))
    return whole.detach() if is_there else merge(parts)


@contextmanager
def _data_alone() -> Iterator[None]:
    """Let every `torch.load` within, whoever calls it, take tensors and plain values and nothing that could run.

    The parts of a checkpoint beside its tensors are pickles: torch itself reads them in full where a checkpoint stores
    an object, and so does Megatron-Core where TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which other tools ask for.
    """
    asked = {name: os.environ.pop(name, None) for name in (_ANYTHING, _DATA_ALONE)}
    os.environ[_DATA_ALONE] = "1"
    try:
        yield
    finally:
        del os.environ[_DATA_ALONE]
        os.environ.update({name: value for name, value in asked.items() if value is not None})


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Turn what torch and Megatron-Core say of a damaged checkpoint into one line; nothing of it can run meanwhile."""
    try:
        with _data_alone():
            yield
    except (pickle.UnpicklingError, CheckpointingException, CheckpointException, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder} cannot be read ({type(error).__name__}: {reason}); delete it.") from error


def load_model(folder: Path, chunks: ModelChunks) -> None:
    """Load weights saved in any layout; collective over all ranks."""
    if not (folder / WEIGHTS / ".metadata").is_file():
        raise CheckpointError(f"{folder} holds no model; run the stage that makes it.")
    load_state(chunks, load_shards(model_state(chunks), folder / WEIGHTS))


class _Slice(LoadPlanner):
    """Reads one box of one stored tensor: what is read is the box where it is all of it, else a part is copied."""

    def __init__(self, key: str, stored: TensorStorageMetadata, offsets: list[int], shape: list[int]) -> None:
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        self.shape, self.dtype = shape, stored.properties.dtype
        self.box: Tensor | None = None
        self.plan = LoadPlan(create_read_items_for_chunk_list(key, stored, [box]))

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        return self.plan

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("a tensor slice holds no bytes")

    def resolve_tensor(self, read_item: ReadItem) -> Any:
        return _Receiver(self, read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: Any) -> None: ...

    def receive(self, read_item: ReadItem, read: Tensor) -> None:
        """Take what was read for an item."""
        if list(read.shape) == self.shape and read.untyped_storage().nbytes() == read.nbytes:
            self.box = read
            return
        if self.box is None:
            self.box = torch.empty(self.shape, dtype=self.dtype)
        part = self.box
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, offset, length)
        part.copy_(read)


class _Receiver:
    """Stands for the tensor that torch's reader copies into, and is given the one that it has read."""

    def __init__(self, planner: _Slice, read_item: ReadItem) -> None:
        self.planner, self.read_item = planner, read_item

    def detach(self) -> _Receiver:
        return self

    def size(self) -> torch.Size:
        return torch.Size(self.read_item.lengths)

    def copy_(self, read: Tensor) -> None:
        self.planner.receive(self.read_item, read)


def read_box(
    reader: FileSystemReader, metadata: Metadata, key: str, offsets: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """Return the part of a stored tensor at `offsets` of this shape, on the CPU; needs no process group."""
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    planner = _Slice(key, stored, list(offsets), list(shape))
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
    assert planner.box is not None
    return planner.box


# Transformer Engine keeps a norm's weight in the linear layer that follows it.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


_NO_WEIGHTS = ("optimizer", "rng", "rerun", "opt_param_scheduler", "chained_")
"""How the keys of training state begin, which such folders may hold beside the weights."""


class Place(NamedTuple):
    """Where a parameter is stored: the key, and its number in each leading axis of the stored tensor, in their order.

    The axes are those of `CheckpointSource.counts`; none where the parameter is stored by itself.
    """

    key: str
    at: dict[str, int]


class CheckpointSource:
    """A `ParameterSource` over a distributed checkpoint: any whole parameter, without process group or model.

    Megatron stacks the layers of a homogeneous model, and their experts: `decoder.layers.mlp.linear_fc2.weight` is
    `[L, H, F]`, `decoder.layers.mlp.experts.experts.linear_fc2.weight` `[L, E, H, F]`, and this class reads only the
    slice of the wanted layer and expert. It also reads what NeMo 2 and Megatron-Bridge write: names
    under `module.`, norms fused into linear layers, a vocabulary padded to another multiple, layers under numbers of
    their own. Every name and shape is checked before the first read.
    """

    def __init__(self, folder: Path, dims: Dims) -> None:
        weights = find_weights(folder)
        if weights is None:
            raise CheckpointError(f"{folder} holds no model; run the stage that makes it.")
        self.reader = FileSystemReader(weights)
        self.metadata = read_metadata(weights)
        self.shapes = parameter_shapes(dims)
        self.counts = {"layers": dims.num_layers, "experts": dims.num_experts}
        self.places = {name: self._place(name) for name in self.shapes}
        self._refuse_others()

    def _place(self, name: str) -> Place:
        stored = self.metadata.state_dict_metadata
        for prefix in ("", "module."):
            for key, at in _possible_places(name):
                if isinstance(stored.get(prefix + key), TensorStorageMetadata):
                    self._check_shape(name, prefix + key, at)
                    return Place(prefix + key, at)
        raise CheckpointError(f"checkpoint {self.reader.path} has no parameter {name}; is this its config?")

    def _refuse_others(self) -> None:
        used = {location.key for location in self.places.values()}
        for key, stored in self.metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and key not in used and not key.startswith(_NO_WEIGHTS):
                if "_extra_state" not in key and not key.endswith("output_layer.weight"):
                    raise CheckpointError(
                        f"checkpoint {self.reader.path} has {key}, which the config does not explain."
                    )

    def _check_shape(self, name: str, key: str, at: dict[str, int]) -> None:
        size = list(self.metadata.state_dict_metadata[key].size)  # type: ignore[union-attr]
        for axis, count in zip(at, size, strict=False):
            if count != self.counts[axis]:
                raise CheckpointError(
                    f"checkpoint {self.reader.path} has {count} {axis}, the config {self.counts[axis]}."
                )
        have, want = size[len(at) :], list(self.shapes[name])
        is_vocabulary = name in (EMBEDDING, OUTPUT_LAYER)
        if have != want and not (is_vocabulary and have[1:] == want[1:] and have[0] >= want[0]):
            raise CheckpointError(f"checkpoint {self.reader.path}: {key} is {have} a layer, by the config {want}.")

    def __call__(self, name: str) -> Tensor:
        key, at = self.places[name]
        shape = self.shapes[name]
        if name == EMBEDDING and OUTPUT_LAYER not in self.shapes:
            self._refuse_other_head(key)
        offsets = [*at.values(), *[0] * len(shape)]
        return read_box(self.reader, self.metadata, key, offsets, [1] * len(at) + list(shape)).view(shape)

    def _refuse_other_head(self, embedding: str) -> None:
        """Compare what is stored as an output layer of a tied model, if anything is, with the embedding."""
        head = embedding.replace(EMBEDDING, OUTPUT_LAYER)
        if isinstance(self.metadata.state_dict_metadata.get(head), TensorStorageMetadata):
            refuse_other_head(self._rows(embedding), self._rows(head), Path(self.reader.path))

    def _rows(self, key: str) -> Iterator[Tensor]:
        """Yield the rows of a stored matrix that are of the vocabulary, in blocks."""
        stored = self.metadata.state_dict_metadata[key]
        rows = min(self.shapes[EMBEDDING][0], stored.size[0])  # type: ignore[union-attr]
        for first in range(0, rows, BLOCK_ROWS):
            shape = [min(BLOCK_ROWS, rows - first), *stored.size[1:]]  # type: ignore[union-attr]
            yield read_box(self.reader, self.metadata, key, [first, *[0] * (len(shape) - 1)], shape)


def stacked_place(name: str, *, fused_norms: tuple[str, ...] = ()) -> Place:
    """Return where a parameter is stored by the tools that stack the layers of a model, and their experts.

    Args:
        fused_norms: Those of `FUSED_NORMS` whose weights are kept in the linear layer that follows.
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if not match:
        return Place(name, {})
    at, tail = {"layers": int(match[1])}, match[2]
    if expert := re.match(r"mlp\.experts\.local_experts\.(\d+)\.", tail):
        at["experts"] = int(expert[1])
        tail = tail.replace(expert[0], "mlp.experts.experts.")
    for norm in fused_norms:
        tail = tail.replace(norm, FUSED_NORMS[norm]) if tail.startswith(norm) else tail
    return Place(f"decoder.layers.{tail}", at)


def _possible_places(name: str) -> list[Place]:
    """Return where the tools we know store a parameter, likeliest first."""
    fused = [(norm,) for norm in FUSED_NORMS if norm in name]
    stacked = [stacked_place(name, fused_norms=norms) for norms in ((), *fused)]
    singly = [
        Place(
            place.key.replace("layers.", f"layers.{place.at['layers']}.", 1),
            {axis: number for axis, number in place.at.items() if axis != "layers"},
        )
        for place in stacked
        if place.at
    ]
    return stacked + singly
