"""What a model folder from outside may say: sizes that some model has, and files that lie in it."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compactlm_nemo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_CONFIG = 16 * 2**20
"""Bytes of a config.json; none known has a thousandth."""

LARGEST: dict[str, int] = {
    "num_hidden_layers": 10_000, "hidden_size": 2**20, "intermediate_size": 2**24, "moe_intermediate_size": 2**24,
    "shared_expert_intermediate_size": 2**24, "num_attention_heads": 2**16, "num_key_value_heads": 2**16,
    "head_dim": 2**16, "vocab_size": 2**28, "num_experts": 2**16, "num_local_experts": 2**16,
    "n_routed_experts": 2**16, "n_shared_experts": 2**16, "first_k_dense_replace": 10_000,
    "num_experts_per_tok": 2**16, "max_position_embeddings": 2**40,
}  # fmt: skip
"""Key of a Hugging Face config -> more than any model has. Lists as long as these are made before anything is read."""


def refuse_absurd_sizes(values: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError where a config's values would fill the memory."""
    for key, largest in LARGEST.items():
        value = values.get(key)
        if isinstance(value, (int, float)) and not -1 <= value <= largest:
            raise CheckpointError(f"{where}: {key}={value} is more than any model has ({largest}); give a real config.")


def refuse_large_config(path: Path) -> None:
    """Raise CheckpointError for a config.json that is none by its size."""
    if (size := path.stat().st_size) > LARGEST_CONFIG:
        raise CheckpointError(f"{path} has {size} bytes, more than a config ({LARGEST_CONFIG}); give a real one.")


def own_file(folder: Path, name: str) -> Path:
    """Return a file that an index of the folder names, which must lie in the folder itself."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{folder} names {name!r} as a file of its own, which lies elsewhere; fetch it again.")
    return folder / name


def companion(folder: Path, name: str) -> Path | None:
    """Return a small file that travels with a model, None where there is none.

    A link that leaves the folder is followed only as the cache of huggingface_hub makes them: a copy of the file goes
    wherever the student does.
    """
    path = folder / name
    if not path.is_file():
        return None
    target, root = path.resolve(), folder.resolve()
    cache = root.parent.parent / "blobs"
    in_cache = root.parent.name == "snapshots" and cache in target.parents
    if root not in target.parents and not in_cache:
        raise CheckpointError(f"{path} is a link to {target}, outside of its folder; put a copy there.")
    return path


BLOCK_ROWS = 8192
"""Rows of embedding and output layer that are compared at a time."""


def refuse_other_head(embedding: Iterable[Tensor], head: Iterable[Tensor], source: Path) -> None:
    """Refuse the output layer that is stored beside a tied embedding and is no copy of it, as merged adapters leave it.

    Both are given in blocks of `BLOCK_ROWS` rows.

    Raises:
        CheckpointError: they differ, and which of them is meant nobody can know.
    """
    pairs = zip_longest(embedding, head)
    if all(rows is not None and others is not None and rows.equal(others) for rows, others in pairs):
        return
    raise CheckpointError(
        f"model.source={source} has an output layer that differs from its embedding, and a config with "
        "tie_word_embeddings=true; set that to false to keep both, or delete the tensor of the output layer."
    )


_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""GGUF's numbers of types of a fixed size -> struct's letter."""
_STRING, _ARRAY = 8, 9
_SHORTEST_TENSOR = 8 + 4 + 4 + 8  # name's length, axes, type, offset


class _Cursor:
    """Walks through a GGUF file's keys, and refuses lengths that the file cannot have."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def skip(self, num_bytes: int) -> None:
        if num_bytes > len(self.data) - self.at:
            raise CheckpointError(
                f"model.source={self.path} is not a readable GGUF file: it declares {num_bytes} bytes where "
                f"{len(self.data) - self.at} are left; fetch it again."
            )
        self.at += num_bytes

    def number(self, kind: str) -> Any:
        start = self.at
        self.skip(struct.calcsize(kind))
        (value,) = struct.unpack_from(kind, self.data, start)
        return value

    def text(self) -> str:
        length = self.number("<Q")
        start = self.at
        self.skip(length)
        return self.data[start : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """Return a value of this type; None for an array, which is passed over."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"model.source={self.path} is not a readable GGUF file: unknown type {kind}.")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[inner]) * count)
        else:
            self.require_room(count, 8)
            for _ in range(count):
                self.skip(self.number("<Q")) if inner == _STRING else self.value(inner)
        return None

    def require_room(self, count: int, smallest: int) -> None:
        """Refuse more items than fit."""
        here = self.at
        self.skip(count * smallest)
        self.at = here


class GgufHeader(NamedTuple):
    """What a GGUF file says before its weights."""

    fields: dict[str, Any]
    """Numbers and texts by key; arrays are None."""
    shapes: dict[str, tuple[int, ...]]
    """Tensor -> axes in the file's order, the fastest first."""


def gguf_header(path: Path) -> GgufHeader:
    """Return a GGUF file's keys and tensors, in a fraction of the time that the reader of `gguf` takes.

    Raises:
        CheckpointError: it declares more than it holds, which a reader would try to allocate.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise CheckpointError(f"model.source={path} is not a readable GGUF file: it is empty; fetch it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            if data[:4] != b"GGUF":
                raise CheckpointError(f"model.source={path} is not a readable GGUF file; give one, or a folder.")
            cursor.skip(8)  # magic and version
            num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
            cursor.require_room(num_keys, 8 + 4)
            fields = {cursor.text(): cursor.value(cursor.number("<I")) for _ in range(num_keys)}
            cursor.require_room(num_tensors, _SHORTEST_TENSOR)
            shapes = {}
            for _ in range(num_tensors):
                name, axes = cursor.text(), cursor.number("<I")
                cursor.require_room(axes, 8)
                shapes[name] = tuple(cursor.number("<Q") for _ in range(axes))
                cursor.skip(4 + 8)  # type and offset
            return GgufHeader(fields, shapes)
