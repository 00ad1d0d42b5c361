"""Stored targets on disk: what a teacher says of every sample, compressed, in shards that any rank can read in part.

A shard is a safetensors file of consecutive samples: `data`, their records one after another, and `offsets`. A record
is self-contained, so a rank reads its samples and no others. Numbers of a record stand byte by byte: all low bytes,
then all high ones, which is what makes them compress.

Shape suffixes: T tokens of a sample, K stored entries, G teacher width.
"""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compactlm_nemo.errors import DataError

STEP_NATS = 0.125
"""Resolution of stored log-probabilities. Rounding to it costs about ``STEP_NATS**2 / 24`` = 0.0007 nats of KL."""
TINY = 1e-38
"""Smaller probabilities are stored as this one."""
ABOUT = "about.json"
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]


class TopKRecord(NamedTuple):
    """A teacher's likeliest tokens for one sample."""

    ids_TK: Tensor
    """``[T, K]`` int64, likeliest first."""
    probs_TK: Tensor
    """``[T, K]`` float32, of the softmax over the vocabulary at temperature 1."""
    rest_T: Tensor
    """``[T]`` float32, ``1 - probs_TK.sum(-1)``."""
    ce_T: Tensor
    """``[T]`` float32, the teacher's language-model loss in nats."""


def encode_top_k(record: TopKRecord) -> bytes:
    """Token ids exact; log-probabilities to `STEP_NATS`, as steps down from the entry before; the rest and the losses
    to half precision of their logarithm and value."""
    ids = record.ids_TK.numpy()
    levels = numpy.rint(-record.probs_TK.double().clamp(min=TINY).log().numpy() / STEP_NATS).astype(numpy.int64)
    steps = numpy.diff(levels, axis=1, prepend=0)
    # Entries of one level may stand in any order: by id they compress better.
    order = numpy.lexsort((ids, levels), axis=1)
    ids = numpy.take_along_axis(ids, order, axis=1)
    halves = [x.double().numpy().astype("<f2") for x in (record.rest_T.double().log(), record.ce_T)]
    parts = [ids.T.astype("<u4").tobytes(), steps.T.astype("<u2").tobytes(), *(half.tobytes() for half in halves)]
    sizes = [4, 2, 2, 2]
    return _pack(b"".join(_by_byte(part, size) for part, size in zip(parts, sizes, strict=True)))


def decode_top_k(data: bytes, tokens: int, k: int) -> TopKRecord:
    """The record; its probabilities are scaled so that with the rest they sum to 1."""
    raw = _unpack(data)
    lengths = [4 * tokens * k, 2 * tokens * k, 2 * tokens, 2 * tokens]
    if len(raw) != sum(lengths):
        raise DataError(f"a stored target has {len(raw)} bytes where {sum(lengths)} were due; cache the teacher again.")
    parts, start = [], 0
    for length, kind in zip(lengths, ("<u4", "<u2", "<f2", "<f2"), strict=True):
        parts.append(_by_value(raw[start : start + length], kind))
        start += length
    ids = torch.from_numpy(parts[0].astype(numpy.int64)).view(k, tokens).T.contiguous()
    levels = torch.from_numpy(parts[1].astype(numpy.int64)).view(k, tokens).T.cumsum(dim=-1)
    rest_T = torch.from_numpy(parts[2].astype(numpy.float32)).exp()
    probs_TK = (-levels.float() * STEP_NATS).exp()
    probs_TK *= ((1 - rest_T) / probs_TK.sum(dim=-1))[:, None]
    return TopKRecord(ids, probs_TK, rest_T, torch.from_numpy(parts[3].astype(numpy.float32)))


_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""Number format of hidden states -> integers of its size."""


def encode_hidden(hidden_TG: Tensor) -> bytes:
    """Final hidden states, bit for bit."""
    bits = hidden_TG.contiguous().view(_BITS[hidden_TG.dtype]).numpy()
    return _pack(_by_byte(bits.tobytes(), bits.itemsize))


def decode_hidden(data: bytes, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """``[T, G]`` of the dtype that was encoded."""
    values = _by_value(_unpack(data), f"<i{dtype.itemsize}")
    if values.size != tokens * width:
        raise DataError(
            f"a stored target has {values.size} values where {tokens * width} were due; cache the teacher again."
        )
    return torch.from_numpy(values.copy()).view(tokens, width).view(dtype)


def _by_byte(values: bytes, size: int) -> bytes:
    return numpy.frombuffer(values, numpy.uint8).reshape(-1, size).T.tobytes()


def _by_value(planes: bytes, kind: str) -> numpy.ndarray:
    size = numpy.dtype(kind).itemsize
    return numpy.frombuffer(numpy.frombuffer(planes, numpy.uint8).reshape(size, -1).T.tobytes(), kind)


def _pack(raw: bytes) -> bytes:
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_FILTERS)


def _unpack(data: bytes) -> bytes:
    return lzma.decompress(data, format=lzma.FORMAT_RAW, filters=_FILTERS)


class Store:
    """A folder of shards.

    Args:
        folder: Holds `about.json` and `shard_00000.safetensors`, ...
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / ABOUT).is_file():
            raise DataError(f"{folder} holds no stored targets; run recipes.cache_teacher.")
        self.about: dict[str, int | str] = json.loads((folder / ABOUT).read_text())
        self.num_samples, self.shard_samples = int(self.about["samples"]), int(self.about["shard_samples"])

    def record(self, sample: int) -> bytes:
        """The stored bytes of a sample of the training order."""
        if not 0 <= sample < self.num_samples:
            raise DataError(
                f"{self.folder} holds targets of {self.num_samples} samples, training asks for sample {sample}; "
                "raise cache.samples and cache the teacher again."
            )
        shard, place = divmod(sample, self.shard_samples)
        with safe_open(shard_path(self.folder, shard), "pt") as file:
            first, last = file.get_slice("offsets")[place : place + 2].tolist()
            return file.get_slice("data")[first:last].numpy().tobytes()

    def num_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("shard_*.safetensors"))


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard is."""
    return folder / f"shard_{shard:05d}.safetensors"


def num_shards(samples: int, shard_samples: int) -> int:
    """Shards that so many samples fill."""
    return math.ceil(samples / shard_samples)


def write_shard(folder: Path, shard: int, records: list[bytes]) -> None:
    """Write a shard so that it is there whole or not at all."""
    lengths = torch.tensor([0, *map(len, records)], dtype=torch.int64)
    data = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)
    path = shard_path(folder, shard)
    save_file({"data": data, "offsets": lengths.cumsum(0)}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
