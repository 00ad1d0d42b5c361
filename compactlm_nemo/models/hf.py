"""Hugging Face folders, read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compactlm_nemo.errors import CheckpointError, NumericsError
from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.deepseek import (
    FP8_BLOCK,
    SCALE,
    dequantised,
    is_further_layer,
    tell_of_further_layers,
)
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import EMBEDDING, FAMILIES, dims_of, hf_names, hf_shapes, is_merged, resized
from compactlm_nemo.models.hf_assets import INDEX, copy_hf_assets, write_for_every_reader
from compactlm_nemo.models.hf_config import with_own_head_size
from compactlm_nemo.models.merged_experts import (
    BLOCKS,
    SCALES,
    expert_number,
    from_merged,
    packed_shapes,
    to_merged,
    unpacked,
)
from compactlm_nemo.models.outside import (
    BLOCK_ROWS,
    own_file,
    refuse_absurd_sizes,
    refuse_large_config,
    refuse_other_head,
)
from compactlm_nemo.models.parameters import parameter_shapes

SHARD_BYTES = 4 * 2**30
"""A safetensors file is closed when it reaches this size, unless another one is asked for."""


def read_config(folder: Path) -> Any:
    """Return the transformers config of a folder."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not folder.is_dir():
        raise CheckpointError(f"model.source={folder} does not exist; give a Hugging Face folder or a .gguf file.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"model.source={folder} has no config.json; give a Hugging Face folder or a .gguf file.")
    try:
        refuse_large_config(folder / "config.json")
        values = json.loads((folder / "config.json").read_text())
        kind = values.get("model_type")
        if kind not in FAMILIES:  # here, because transformers' own message on an unknown type is about upgrading it
            raise CheckpointError(
                f"{folder}/config.json: model_type={kind} is not supported; use one of {', '.join(FAMILIES)}."
            )
        refuse_absurd_sizes(values, f"{folder}/config.json")
        if (as_mistral := with_own_head_size(values)) != values:
            return AutoConfig.for_model(as_mistral.pop("model_type"), **as_mistral)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}/config.json cannot be read: {reason}") from None


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Return rows in Megatron's order: for each group its query heads, its key head, its value head."""
    parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(qkv: Tensor, heads: int, groups: int, head_dim: int) -> list[Tensor]:
    """Return query, key and value rows: the inverse of `merge_qkv`."""
    rows = qkv.reshape(groups, -1, *qkv.shape[1:])
    sizes = [heads // groups * head_dim, head_dim, head_dim]
    return [part.flatten(0, 1) for part in rows.split(sizes, dim=1)]


class HFSource:
    """A `ParameterSource` over the safetensors of a folder.

    Names and shapes of all tensors are checked from the headers when it is made; weights are read one by one after. One
    file is open at a time: what was read of a file stays in memory until it is closed.
    """

    def __init__(self, folder: Path, dims: Dims) -> None:
        self.dims = dims
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for path in _weight_files(folder):
            handle = _opened(path)
            names = list(handle.keys())
            self.files |= dict.fromkeys(names, path)
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in names}
            dtypes |= {name: handle.get_slice(name).get_dtype() for name in names}
        self._check(shapes, dtypes)

    def _file(self, name: str) -> Any:
        """Return the file of a tensor, opened, and close the one before."""
        path = self.files[name]
        if self._open is None or self._open[0] != path:
            self._open = None
            self._open = path, _opened(path)
        return self._open[1]

    def _check(self, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for name, shape in parameter_shapes(self.dims).items():
            expected |= zip(hf_names(name, self.dims), hf_shapes(name, shape, self.dims), strict=True)
            if is_merged(name, self.dims) and (packed := hf_names(name, self.dims)[0]) + BLOCKS in self.files:
                expected |= packed_shapes(packed, expected.pop(packed))
        if missing := [name for name in expected if name not in self.files]:
            raise CheckpointError(
                f"model.source={self.folder} lacks {len(missing)} tensors, first {missing[0]}; is a shard missing?"
            )
        ignored = {"lm_head.weight"} if self.dims.tied_embeddings else set()
        extra = self.files.keys() - expected.keys() - ignored
        if further := {name for name in extra if is_further_layer(name, self.dims)}:
            tell_of_further_layers(self.folder, len(further))
        extra -= further
        self.scaled = {name for name in expected if name + SCALE in extra and dtypes[name] == "F8_E4M3"}
        extra -= {name + SCALE for name in self.scaled}
        if extra := {name for name in extra if not name.endswith("rotary_emb.inv_freq")}:
            raise CheckpointError(
                f"model.source={self.folder} has {len(extra)} tensors its config.json does not explain, "
                f"first {min(extra)}; only plain decoders without adapters or quantisation are read."
            )
        for name in self.scaled:
            expected[name + SCALE] = tuple(-(-size // FP8_BLOCK) for size in expected[name])
        bare = [name for name in shapes if dtypes[name] == "F8_E4M3" and name in expected.keys() - self.scaled]
        if self.scaled and bare:
            raise CheckpointError(f"model.source={self.folder} lacks {bare[0]}{SCALE}; fetch it again.")
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise CheckpointError(
                    f"model.source={self.folder}: {name} has shape {list(shapes[name])} in the files and {list(shape)} "
                    "by config.json; they belong to different models."
                )

    def __call__(self, name: str) -> Tensor:
        if name == EMBEDDING and self.dims.tied_embeddings and "lm_head.weight" in self.files:
            refuse_other_head(self._rows(*hf_names(name, self.dims)), self._rows("lm_head.weight"), self.folder)
        if is_merged(name, self.dims):
            return self._of_expert(name)
        parts = [self._tensor(n) for n in hf_names(name, self.dims)]
        if "linear_qkv" in name:
            if len(parts) == 1:
                groups, head_dim = self.dims.num_query_groups, self.dims.head_dim
                parts = list(parts[0].split([heads * head_dim for heads in (self.dims.num_heads, groups, groups)]))
            q, k, v = parts
            return merge_qkv(q, k, v, self.dims.num_query_groups)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tensor(self, name: str) -> Tensor:
        """Read a tensor; weights in float8 are multiplied with their scales, float32."""
        tensor: Tensor = self._file(name).get_tensor(name)
        return dequantised(tensor, self._file(name + SCALE).get_tensor(name + SCALE)) if name in self.scaled else tensor

    def _of_expert(self, name: str) -> Tensor:
        """Return a parameter of one expert, of which alone the bytes are read."""
        (key,), expert = hf_names(name, self.dims), expert_number(name)
        if key in self.files:
            return from_merged(name, self._file(key).get_slice(key)[expert])
        blocks, scales = (self._file(key + end).get_slice(key + end)[expert] for end in (BLOCKS, SCALES))
        return from_merged(name, unpacked(blocks, scales))

    def _rows(self, key: str) -> Iterator[Tensor]:
        """Yield a matrix in blocks of rows, so that two large ones can be compared."""
        matrix = self._file(key).get_slice(key)
        for first in range(0, matrix.get_shape()[0], BLOCK_ROWS):
            yield matrix[first : first + BLOCK_ROWS]


def _opened(path: Path) -> Any:
    """Return a safetensors file whose header is read."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again.") from None


def weight_names(folder: Path, there: Collection[str], where: str) -> list[str]:
    """Return the files transformers would read: those of the index, or `model.safetensors`, or all there are.

    Some repositories keep a second copy under other tensor names beside them, so the folder's list is no guide.

    Args:
        folder: Where the index is, if there is one.
        there: Names of all files of the model, here or where they are to be fetched from.
        where: Names the model in messages.
    """
    if (index := folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index} is damaged; fetch it again.") from None
        if missing := [name for name in names if own_file(folder, name).name not in there]:
            raise CheckpointError(
                f"{where} lacks {len(missing)} of {len(names)} shards, first {missing[0]}; fetch them."
            )
        return names
    if "model.safetensors" in there:
        return ["model.safetensors"]
    names = sorted(name for name in there if name.endswith(".safetensors") and "/" not in name)
    if not names:
        pickled = sorted(name for name in there if name.endswith((".bin", ".pt", ".pth")) and "/" not in name)
        beside = f" beside {pickled[0]}" if pickled else ""
        raise CheckpointError(
            f"{where} has no *.safetensors file{beside}; pickled weights are not read, as they can run code: convert "
            "them."
        )
    return names


def _weight_files(folder: Path) -> list[Path]:
    there = [path.name for path in folder.iterdir() if path.is_file()]
    return [folder / name for name in weight_names(folder, there, f"model.source={folder}")]


def open_hf(folder: Path) -> tuple[Dims, HFSource]:
    """Return architecture and weights of a Hugging Face folder; all checks are done when this returns."""
    dims = dims_of(read_config(folder))
    return dims, HFSource(folder, dims)


def export_hf(
    hf_assets: Path,
    folder: Path,
    dims: Dims,
    source: ParameterSource,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a Hugging Face folder from a source and return the number of parameters in the written files.

    Raises:
        NumericsError: a weight is NaN or infinite in this number format.
    """
    write_assets(hf_assets, folder, dims, dtype)
    numbers = shard_numbers(dims, dtype, shard_bytes)
    shard: dict[str, Tensor] = {}
    total_params = 0
    for hf_name, part in hf_tensors(dims, source, dtype):
        if shard and numbers[hf_name] != numbers[next(iter(shard))]:
            _write_shard(folder, numbers, shard)
            shard = {}
        shard[hf_name] = part.contiguous()
        total_params += part.numel()
    _write_shard(folder, numbers, shard)
    if max(numbers.values()) > 1:
        write_index(folder, numbers, total_params * dtype.itemsize)
    return total_params


def hf_tensors(dims: Dims, source: ParameterSource, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of a model with their names, in the order in which they are written.

    Raises:
        NumericsError: a weight is NaN or infinite in this number format.
    """
    merged: dict[str, list[Tensor]] = {}
    for name in parameter_shapes(dims):
        full = finite_as(source, name, dtype)
        if is_merged(name, dims):
            (key,) = hf_names(name, dims)
            merged.setdefault(key, []).append(to_merged(name, full))
            if len(merged[key]) == dims.num_experts:
                yield key, torch.stack(merged.pop(key))
            continue
        if "linear_qkv" in name:
            full = torch.cat(split_qkv(full, dims.num_heads, dims.num_query_groups, dims.head_dim))
        rows = [shape[0] for shape in hf_shapes(name, tuple(full.shape), dims)]
        yield from zip(hf_names(name, dims), full.split(rows), strict=True)


def write_assets(hf_assets: Path, folder: Path, dims: Dims, dtype: torch.dtype) -> None:
    """Write what a Hugging Face folder has beside its weights: config.json of these sizes, tokenizer, licence."""
    copy_hf_assets(hf_assets, folder)
    config = resized(read_config(hf_assets), dims)
    config.dtype = dtype
    config.save_pretrained(folder)
    write_for_every_reader(folder)


def finite_as(source: ParameterSource, name: str, dtype: torch.dtype) -> Tensor:
    """Return a parameter in a number format.

    Raises:
        NumericsError: it is NaN or infinite there.
    """
    full = source(name)
    if not name.endswith(".expert_bias"):  # float32 in every file: rounded, it would choose others
        full = full.to(dtype)
    if not full.isfinite().all():
        raise NumericsError(f"{name} is not finite as {dtype}; nothing of it is exported. Give another export.dtype.")
    return full


def shard_numbers(dims: Dims, dtype: torch.dtype, shard_bytes: int) -> dict[str, int]:
    """Return in which file, counted from 1, each Hugging Face tensor is, in the order in which they are written."""
    numbers: dict[str, int] = {}
    number, size_bytes = 1, 0
    for name, shape in parameter_shapes(dims).items():
        for hf_name, part in zip(hf_names(name, dims), hf_shapes(name, shape, dims), strict=True):
            if hf_name in numbers:  # of an expert before
                continue
            num_bytes = prod(part) * dtype.itemsize
            if size_bytes and size_bytes + num_bytes > shard_bytes:
                number, size_bytes = number + 1, 0
            numbers[hf_name] = number
            size_bytes += num_bytes
    return numbers


def _file_of(number: int, numbers: dict[str, int]) -> str:
    """Return the name that transformers looks for, which holds the number of files."""
    count = max(numbers.values())
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_shard(folder: Path, numbers: dict[str, int], shard: dict[str, Tensor]) -> None:
    save_file(shard, folder / _file_of(numbers[next(iter(shard))], numbers), metadata={"format": "pt"})


def write_index(folder: Path, numbers: dict[str, int], total_bytes: int) -> None:
    """Write which tensor is in which file."""
    weight_map = {name: _file_of(number, numbers) for name, number in numbers.items()}
    text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(text)


def count_params(folder: Path) -> int:
    """Return parameters in the safetensors of a folder, counted from the files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                total += torch.Size(handle.get_slice(name).get_shape()).numel()
    return total
