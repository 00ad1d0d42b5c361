"""Stored targets on disk: a teacher's predictions for every sample, compressed, in shards that ranks read in part.

A shard is a safetensors file of consecutive samples: `data` holds their records one after another, `offsets` where each
begins. A record is self-contained, so a rank reads the records of its own samples only. The numbers of a record are
stored byte by byte, all low bytes first and all high bytes last, because they compress better that way. Where not all
predictions count, a record holds those that do, behind a bit for each token of the sample.

Shape suffixes: T tokens of a sample, K stored entries, G teacher width.
"""

from __future__ import annotations

import json
import lzma
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compactlm_nemo.artifacts import sealed
from compactlm_nemo.errors import DataError

METADATA = "targets.json"
"""The header of a folder of shards: the number of samples, the kind of targets, and the teacher that gave them."""


_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0, "dict_size": 4096}]
"""LZMA of likeliest tokens, 64 in 99.5 bytes; a larger dictionary takes twice the time and saves nothing."""


class TopKRecord(NamedTuple):
    """The likeliest tokens of a teacher at every position of one sample."""

    ids_TK: Tensor
    """``[T, K]`` int64, in any order."""
    probs_TK: Tensor
    """``[T, K]`` float32, of the softmax over the vocabulary at temperature 1."""
    rest_T: Tensor
    """``[T]`` float32, ``1 - probs_TK.sum(-1)``."""
    ce_T: Tensor
    """``[T]`` float32, the teacher's language-model loss in nats."""


def _levels() -> numpy.ndarray:
    """Return the log-probabilities that can be stored, from 0 down by ``min(max(0.05 / sqrt(p), 1/8), 2)`` nats.

    Rounding p by a step s costs ``p s**2 / 24`` nats of KL in the mean: at this width every token below p = 0.16 costs
    1e-4, where equal steps would spend most bytes on the least likely tokens.
    """
    levels = [0.0]
    while levels[-1] > -90:
        levels.append(levels[-1] - min(max(0.05 * math.exp(-levels[-1] / 2), 0.125), 2.0))
    return numpy.array(levels)


LEVELS = _levels()


STEPS_PER_NAT = 32
"""Resolution of the rest's logarithm and of the loss."""


NO_REST = 2**16 - 1
"""Stored in place of the rest's logarithm where the rest is 0."""


def encode_top_k(record: TopKRecord) -> bytes:
    """Encode a record: exact token ids, log-probabilities rounded to `LEVELS`, rest and losses rounded to 1/32 nat.

    Ids are stored in ascending order as the gaps between them, log-probabilities as levels above the least likely one,
    and the rest by its logarithm.
    """
    ids, order = (x.numpy() for x in record.ids_TK.sort(dim=1))
    log_p = record.probs_TK.double().clamp(min=1e-38).log().numpy()
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2
    levels = numpy.searchsorted(-middles, -numpy.take_along_axis(log_p, order, axis=1))
    lowest = levels.max(axis=1)
    rest_T = record.rest_T.double().numpy()
    with numpy.errstate(divide="ignore"):
        rest = numpy.where(rest_T > 0, numpy.minimum(numpy.rint(-numpy.log(rest_T) * STEPS_PER_NAT), NO_REST), NO_REST)
    losses = numpy.rint(record.ce_T.double().numpy() * STEPS_PER_NAT).clip(0, NO_REST)
    columns = (numpy.diff(ids, axis=1, prepend=-1).T, (lowest[:, None] - levels).T, lowest, rest, losses)
    return _compressed(
        b"".join(
            _by_byte(numpy.ascontiguousarray(values).astype(kind).tobytes(), numpy.dtype(kind).itemsize)
            for values, kind in zip(columns, _KINDS, strict=True)
        )
    )


_KINDS = ("<u4", "u1", "u1", "<u2", "<u2")
"""Number formats of the columns of a record."""


def decode_top_k(data: bytes, tokens: int, k: int) -> TopKRecord:
    """Decode a record of `tokens` positions: ids ascend, and the probabilities are scaled to sum to 1 with the rest."""
    counts = (tokens * k, tokens * k, tokens, tokens, tokens)
    lengths = [count * numpy.dtype(kind).itemsize for count, kind in zip(counts, _KINDS, strict=True)]
    raw = _decompressed(data, sum(lengths))
    columns, start = [], 0
    for length, kind in zip(lengths, _KINDS, strict=True):
        columns.append(_by_value(raw[start : start + length], kind).astype(numpy.int64))
        start += length
    gaps, above, lowest, rest, losses = columns
    ids = gaps.reshape(k, tokens).cumsum(axis=0).T - 1
    probs_TK = torch.from_numpy(numpy.exp(LEVELS[lowest[:, None] - above.reshape(k, tokens).T])).float()
    rest_T = torch.from_numpy(numpy.where(rest == NO_REST, 0, numpy.exp(-rest / STEPS_PER_NAT))).float()
    probs_TK *= ((1 - rest_T) / probs_TK.sum(dim=-1))[:, None]
    ce_T = torch.from_numpy(losses / STEPS_PER_NAT).float()
    return TopKRecord(torch.from_numpy(numpy.ascontiguousarray(ids)), probs_TK, rest_T, ce_T)


def counted_record(counts_T: Tensor, record: bytes) -> bytes:
    """Put what tells which tokens of a sample count, boolean, before the record of those."""
    return numpy.packbits(counts_T.numpy()).tobytes() + record


def split_record(data: bytes, tokens: int) -> tuple[Tensor, bytes]:
    """Return what `counted_record` put together, for a sample of `tokens` tokens."""
    num_bytes = -(-tokens // 8)
    counts = numpy.unpackbits(numpy.frombuffer(data[:num_bytes], numpy.uint8), count=tokens)
    return torch.from_numpy(counts.astype(bool)), data[num_bytes:]


def spread(rows: Tensor, counts_T: Tensor) -> Tensor:
    """Return ``[T, ...]`` with the rows at the tokens that count.

    The others, whose mask is 0, get the row before them, or the first: values that occur, so that nothing overflows.
    """
    return rows[(counts_T.cumsum(dim=0) - 1).clamp(min=0)]


_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""Number format of hidden states -> integers of its size."""


def encode_hidden(hidden_TG: Tensor) -> bytes:
    """Encode the final hidden states of a sample, bit for bit.

    Their bytes repeat no sequence, so each is coded by its frequency alone (Huffman): as small as LZMA of them, which
    takes 100 times as long to encode and 5 times as long to decode.
    """
    bits = hidden_TG.contiguous().view(_BITS[hidden_TG.dtype]).numpy()
    huffman = zlib.compressobj(method=zlib.DEFLATED, wbits=_RAW, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return huffman.compress(_by_byte(bits.tobytes(), bits.itemsize)) + huffman.flush()


_RAW = -zlib.MAX_WBITS
"""Deflate without header and checksum."""


def decode_hidden(data: bytes, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Decode hidden states ``[T, G]``, stored in `dtype`."""
    decoder, length = zlib.decompressobj(wbits=_RAW), tokens * width * dtype.itemsize
    try:
        raw = decoder.decompress(data, length + 1)
    except zlib.error as error:
        raise _damaged(error) from None
    _require_whole(raw, length, decoder.eof)
    values = _by_value(raw, f"<i{dtype.itemsize}")
    return torch.from_numpy(values.copy()).view(tokens, width).view(dtype)


def _by_byte(values: bytes, size: int) -> bytes:
    return numpy.frombuffer(values, numpy.uint8).reshape(-1, size).T.tobytes()


def _by_value(planes: bytes, kind: str) -> numpy.ndarray:
    size = numpy.dtype(kind).itemsize
    return numpy.frombuffer(numpy.frombuffer(planes, numpy.uint8).reshape(size, -1).T.tobytes(), kind)


def _compressed(raw: bytes) -> bytes:
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_FILTERS)


def _decompressed(data: bytes, length: int) -> bytes:
    """Return the `length` bytes that a record holds; no more are made of it, whatever it would grow to."""
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_FILTERS)
    try:
        raw = decoder.decompress(data, length + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise _damaged(error) from None
    _require_whole(raw, length, decoder.eof)
    return raw


def _require_whole(raw: bytes, length: int, is_at_end: bool) -> None:
    if len(raw) != length:
        found = f"{len(raw)} bytes" if len(raw) < length else "more bytes"
        raise DataError(f"a stored target has {found} where {length} were due; cache the teacher again.")
    if not is_at_end:
        raise _damaged("its end is missing")


def _damaged(error: Exception | str) -> DataError:
    return DataError(f"a stored target is damaged ({error}); cache the teacher again.")


class StoredTargets:
    """A folder of shards, read sample by sample.

    Args:
        folder: Holds `targets.json` and `shard_00000.safetensors`, ...
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / METADATA).is_file():
            raise DataError(f"{folder} holds no stored targets; run recipes.cache_teacher.")
        self.metadata: dict[str, int | str] = json.loads((folder / METADATA).read_text())
        self.num_samples, self.shard_samples = int(self.metadata["samples"]), int(self.metadata["shard_samples"])

    def record(self, sample: int) -> bytes:
        """Return the record of a sample, numbered in the training order."""
        if not 0 <= sample < self.num_samples:
            raise DataError(
                f"{self.folder} holds targets of {self.num_samples} samples, training asks for sample {sample}; "
                "raise cache.samples and cache the teacher again."
            )
        shard, row = divmod(sample, self.shard_samples)
        with safe_open(shard_path(self.folder, shard), "pt") as file:
            first, last = file.get_slice("offsets")[row : row + 2].tolist()
            return file.get_slice("data")[first:last].numpy().tobytes()

    def num_bytes(self) -> int:
        """Return bytes of all shards on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("shard_*.safetensors"))


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard_{shard:05d}.safetensors"


def num_shards(samples: int, shard_samples: int) -> int:
    """Return the number of shards that `samples` samples fill."""
    return math.ceil(samples / shard_samples)


def write_shard(folder: Path, shard: int, records: list[bytes]) -> None:
    """Write a shard; a kill at any instant leaves the whole file or none."""
    lengths = torch.tensor([0, *map(len, records)], dtype=torch.int64)
    data = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)
    with sealed(shard_path(folder, shard)) as path:
        save_file({"data": data, "offsets": lengths.cumsum(0)}, path)
