"""Reads the index of a `torch_dist` checkpoint, which is a pickle, without running what it says.

torch reads `.metadata` with a bare `pickle.load`, so whoever wrote the folder decides what runs. Here only the classes
that checkpoints hold are looked up; any other name ends in an error before anything is called.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.outside import own_file

_DCP = "torch.distributed.checkpoint"
ALLOWED = {
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}  # fmt: skip
"""Module -> names that a checkpoint's index may refer to, beside the dtypes of torch."""

_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
STAND_INS = {
    (_MEGATRON, "MCoreMetadata"): Metadata,
    (_MEGATRON, "MCoreSavePlan"): SavePlan,
    ("pathlib._local", "PosixPath"): PosixPath,
}
"""Names in an index of Megatron-Core 0.15 or NeMo 2 -> torch's class that theirs extends by a dict; and the class of
paths as Python 3.13 calls it."""


class _RefusedName(Exception):
    """A name that no checkpoint needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in ALLOWED.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        raise _RefusedName(f"{module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """Return the index of a `torch_dist` folder, `folder/.metadata`.

    Raises:
        CheckpointError: the file is damaged, is no index, or refers to something that could run code.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except _RefusedName as refused:
        raise CheckpointError(
            f"{path} refers to {refused}, which no checkpoint needs and which could run code; nothing of it was run. "
            "Do not use this folder."
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); fetch the folder again.") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} holds a {type(metadata).__name__} and no index; fetch the folder again.")
    _check_places(path, metadata)
    return metadata


def _check_places(path: Path, metadata: Metadata) -> None:
    """Raise CheckpointError unless every part of a tensor lies in a file of the folder, inside that file."""
    sizes: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        name = str(part.relative_path)
        if name not in sizes:
            file = own_file(path.parent, name)
            if not file.is_file():
                raise CheckpointError(f"{path} names {name}, which is not there; fetch the folder again.")
            sizes[name] = file.stat().st_size
        if not 0 <= part.offset <= part.offset + part.length <= sizes[name]:
            raise CheckpointError(
                f"{path.parent / name} has {sizes[name]} bytes, by the index {part.offset + part.length}; it was cut "
                "off: fetch the folder again."
            )
