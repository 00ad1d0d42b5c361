"""Writes a `torch_dist` checkpoint that other tools load, one parameter at a time and in one process.

Megatron-Core's own writer takes the whole model of a rank at once, with a vocabulary that is padded as its layout needs
it. Here a parameter is asked for when its bytes are written, so that memory holds one of them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What Megatron-Core's `metadata.json` says of the format."""


@dataclass(frozen=True)
class Part:
    """One parameter as a box of a stored tensor."""

    key: str
    size: tuple[int, ...]
    """Of the stored tensor."""
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the box; the parameter has the last of its axes."""
    name: str
    """What the parameter is asked for by."""


def write_torch_dist(
    folder: Path,
    parts: list[Part],
    objects: list[str],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    common: Mapping[str, Any],
) -> None:
    """Write `.metadata`, one `.distcp` file, `common.pt` and `metadata.json`. Not collective: one process calls it.

    Args:
        objects: Keys of Transformer Engine's states, each written as one empty: a model without fp8 has none.
        read: Returns the parameter of a name; called once for each part, in their order.
        dtype: Number format in which the parameters are written.
        common: What Megatron-Core keeps beside the shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer, properties = FileSystemWriter(folder), TensorProperties(dtype=dtype)
    by_index = {MetadataIndex(part.key, part.offsets): part for part in parts}
    stored: dict[str, Any] = dict.fromkeys(objects, BytesStorageMetadata())
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
    for index, part in by_index.items():
        box, size = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.shape)), torch.Size(part.size)
        stored.setdefault(part.key, TensorStorageMetadata(properties, size, [])).chunks.append(box)
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(box, properties, size)))
    writer.set_up_storage_writer(is_coordinator=True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])
    results = writer.write_data(plan, _Values(by_index, lambda part: read(part.name).to(dtype).view(part.shape)))
    writer.finish(Metadata(stored), [results.wait()])
    torch.save(dict(common), folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(BACKENDS))


class _Values(DefaultSavePlanner):
    """Gives the writer what it writes, each parameter only when it is its turn."""

    def __init__(self, parts: dict[MetadataIndex, Part], value_of: Callable[[Part], Tensor]) -> None:
        super().__init__()
        self.parts, self.value_of = parts, value_of
        empty = io.BytesIO()
        torch.save([torch.empty(0, dtype=torch.uint8)], empty)  # Megatron-Core stores a list of a key's objects
        self.empty = empty.getvalue()

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self.empty)
        return self.value_of(self.parts[write_item.index])
