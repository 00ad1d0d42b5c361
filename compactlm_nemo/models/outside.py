"""What a model folder from outside may say: sizes that some model has, and files that lie in it."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_CONFIG = 16 * 2**20
"""Bytes of a config.json; none known has a thousandth."""

LARGEST: dict[str, int] = {
    "num_hidden_layers": 10_000, "hidden_size": 2**20, "intermediate_size": 2**24, "moe_intermediate_size": 2**24,
    "shared_expert_intermediate_size": 2**24, "num_attention_heads": 2**16, "num_key_value_heads": 2**16,
    "head_dim": 2**16, "vocab_size": 2**28, "num_experts": 2**16, "num_local_experts": 2**16,
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


_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""GGUF's numbers of types of a fixed size -> bytes."""
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

    def number(self, kind: str) -> int:
        start = self.at
        self.skip(struct.calcsize(kind))
        (value,) = struct.unpack_from(kind, self.data, start)
        return int(value)

    def value(self, kind: int) -> None:
        """Skip a value of this type."""
        if kind == _STRING:
            self.skip(self.number("<Q"))
        elif kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SCALARS:
                self.skip(_SCALARS[inner] * count)
            else:
                self.require_room(count, 8)
                for _ in range(count):
                    self.value(inner)
        elif kind in _SCALARS:
            self.skip(_SCALARS[kind])
        else:
            raise CheckpointError(f"model.source={self.path} is not a readable GGUF file: unknown type {kind}.")

    def require_room(self, count: int, smallest: int) -> None:
        """Refuse more items than fit."""
        here = self.at
        self.skip(count * smallest)
        self.at = here


def check_gguf_lengths(path: Path) -> None:
    """Raise CheckpointError where a GGUF file declares more than it holds, which its reader would try to allocate."""
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
            for _ in range(num_keys):
                cursor.value(_STRING)
                cursor.value(cursor.number("<I"))
            cursor.require_room(num_tensors, _SHORTEST_TENSOR)
