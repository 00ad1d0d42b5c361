"""Megatron distributed checkpoints: saved and loaded on the mesh, or read parameter by parameter without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import parameter_shapes
from compactlm_nemo.parallel.groups import Mesh

WEIGHTS = "weights"
"""Subfolder of a model folder with the distributed checkpoint; `model.json` and `hf/` stand beside it."""


def sharding_metadata(mesh: Mesh) -> dict[str, Any]:
    """Tells Megatron how its optimizer state is to be sharded: so that any other layout can load it."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": mesh.dp_group}


def save_model(folder: Path, model: Any, mesh: Mesh) -> None:
    """Save the model's shards under `folder/weights`; collective over all ranks."""
    target = folder / WEIGHTS
    target.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(metadata=sharding_metadata(mesh)), str(target))


def load_model(folder: Path, model: Any, mesh: Mesh) -> None:
    """Load weights saved in any layout; collective over all ranks."""
    if not (folder / WEIGHTS / ".metadata").is_file():
        raise CheckpointError(f"{folder} holds no model; run the stage that makes it.")
    state = dist_checkpointing.load(model.sharded_state_dict(metadata=sharding_metadata(mesh)), str(folder / WEIGHTS))
    model.load_state_dict(state, strict=True)


class _Slice(LoadPlanner):
    """Reads one box of one stored tensor into a given buffer."""

    def __init__(self, key: str, stored: TensorStorageMetadata, offsets: list[int], buffer: Tensor) -> None:
        box = ChunkStorageMetadata(torch.Size(offsets), buffer.shape)
        self.offsets, self.buffer = offsets, buffer
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

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        box = self.buffer
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            box = box.narrow(dim, offset, length)
        return box

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


class CheckpointSource:
    """A `ParameterSource` over a distributed checkpoint: any whole parameter, without process group or model.

    Megatron stacks the layers of a homogeneous model: `decoder.layers.mlp.linear_fc2.weight` is `[L, H, F]`, and
    this class reads only the slice of the wanted layer.
    """

    def __init__(self, folder: Path, dims: Dims) -> None:
        weights = folder / WEIGHTS
        if not (weights / ".metadata").is_file():
            raise CheckpointError(f"{folder} holds no model; run the stage that makes it.")
        self.reader = FileSystemReader(weights)
        self.metadata = self.reader.read_metadata()
        self.shapes = parameter_shapes(dims)

    def __call__(self, name: str) -> Tensor:
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        key = f"decoder.layers.{match[2]}" if match else name
        stored = self.metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"checkpoint {self.reader.path} has no parameter {key}.")
        shape = self.shapes[name]
        box = ([1, *shape], [int(match[1])] + [0] * len(shape)) if match else (list(shape), [0] * len(shape))
        buffer = torch.empty(box[0], dtype=stored.properties.dtype)
        planner = _Slice(key, stored, box[1], buffer)
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        plan = self.reader.prepare_local_plan(planner.create_local_plan())
        self.reader.read_data(plan, planner).wait()
        return buffer[0] if match else buffer
