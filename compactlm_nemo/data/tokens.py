"""Turns texts and chats into tokens: records in, a Megatron indexed dataset (`PREFIX.bin`, `PREFIX.idx`) out.

Chats have a mask beside them, `PREFIX.mask` (`data.answer_mask`). Every rank tokenises pieces of the texts
(`data.records`) into part files, which stay after a kill; the main rank joins them in order. So the result is the same
for any number of ranks, and after any number of starts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from compactlm_nemo.artifacts import sealed
from compactlm_nemo.config.data import LossOn
from compactlm_nemo.data.answer_mask import SUFFIX, AnswerMaskWriter
from compactlm_nemo.data.documents import EMPTY, INNER_ENDS, SPECIAL_TOKENS, DocumentEncoder, EncodedPiece
from compactlm_nemo.data.records import missing_sources, read_pieces, sources_of, total_bytes
from compactlm_nemo.data.windows import TokenStream
from compactlm_nemo.errors import DataError, OtherRankError
from compactlm_nemo.parallel.collectives import all_gather_objects, broadcast_object
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.parallel.world import is_main_rank

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]

_MAP_TOKENS = 2**22

_log = logging.getLogger(__name__)


class Counts(NamedTuple):
    """What a corpus holds."""

    tokens: int
    """Tokens, ends of documents included."""
    answer_tokens: int
    """Tokens whose prediction counts: those of answers, and all of plain text."""
    documents: int
    troubles: dict[str, int]
    """Records with a kind of trouble, by what is amiss with them."""
    digests: dict[bytes, str]
    """What the documents say, each with its place; empty unless asked for."""


def tokenize_corpus(
    path: Path | str | list[str],
    prefix: Path,
    encoder: DocumentEncoder,
    *,
    parts: Path | None = None,
    keeps_digests: bool = False,
    bar: Bar = lambda num_bytes: nullcontext(lambda count: None),
) -> Counts:
    """Tokenise every record; each document is its tokens followed by the token that ends it. Collective.

    Args:
        path: Files, folders, globs or data sets of the Hub (`data.records`).
        prefix: `PREFIX.bin`, `PREFIX.mask` where there are chats, and `PREFIX.idx` appear when everything is written
            (the index last), or not at all.
        parts: Begin of the names of part files of this text with these settings, which are used where they exist
            already; None keeps them nowhere.
        keeps_digests: Whether the result has `digests`.
        bar: Given the bytes that this rank will read, shows the progress.
    Returns:
        What was written; tokens are uint16 when the vocabulary allows, else int32.
    Raises:
        DataError: a source cannot be read, a record is no document, or all are empty.
    """
    asked = str(path) if isinstance(path, Path) else path
    if not 0 <= encoder.eod < encoder.num_tokens:
        raise DataError(
            f"{asked}: end-of-document token {encoder.eod} is outside the vocabulary of {encoder.num_tokens} tokens."
        )
    if missing := missing_sources(asked):
        raise DataError(f"{missing[0]} does not exist; give a JSON-lines file with a `text` field.")
    sources = broadcast_object(sources_of(asked))
    with tempfile.TemporaryDirectory() as folder:
        names = _write_parts(sources, encoder, broadcast_object(parts or Path(folder) / "part"), bar)
        counts: Counts | None = None
        with main_rank_writes() as writes:
            if writes:
                counts = _join(asked, names, prefix, encoder, sources if keeps_digests else [])
        counts = broadcast_object(counts)
    assert counts is not None  # the main rank has written, or all ranks have raised
    return counts


def map_tokens(prefix: Path, target: Path, encoder: DocumentEncoder) -> None:
    """Write Megatron's files of a corpus again with the ids of a trimmed vocabulary, each as wide as it was.

    Args:
        prefix: `PREFIX.bin`, `PREFIX.idx` and perhaps `PREFIX.mask`, with the ids of the whole tokenizer.
        target: Prefix of the new files.
        encoder: Has the tokenizer and `new_ids`.
    Raises:
        DataError: a file is damaged, or holds a token that the vocabulary has not.
    """
    ids = TokenStream(prefix, encoder.num_tokens, LossOn.all).ids
    assert encoder.new_ids is not None
    table = numpy.full(encoder.num_tokens, -1, dtype=numpy.int64)
    table[list(encoder.new_ids)] = list(encoder.new_ids.values())
    with Path(f"{target}.bin").open("wb") as file:
        for start in range(0, len(ids), _MAP_TOKENS):
            block = ids[start : start + _MAP_TOKENS]
            mapped = table[block]
            if (lacking := numpy.flatnonzero(mapped < 0)).size:
                number = int(block[lacking[0]])
                raise DataError(
                    f"{prefix}.bin needs the token {encoder.tokenizer.convert_ids_to_tokens(number)!r} ({number}, at "
                    f"place {start + int(lacking[0])}), which the trimmed vocabulary has not; add its text to "
                    "model.vocab_texts."
                )
            file.write(mapped.astype(ids.dtype).tobytes())
    for suffix in (SUFFIX, ".idx"):
        if Path(f"{prefix}{suffix}").is_file():
            shutil.copyfile(f"{prefix}{suffix}", f"{target}{suffix}")


def _write_parts(sources: list[str], encoder: DocumentEncoder, parts: Path, bar: Bar) -> list[Path]:
    """Tokenise this rank's pieces, and return the part files of all ranks in the order of the pieces."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    by_source = len(sources) >= world  # else ranks share every source: each reads it and parses its own pieces

    def is_read(number: int) -> bool:
        return not by_source or number % world == rank

    written: list[Path] = []

    def is_wanted(place: tuple[int, int]) -> bool:
        if not by_source and place[1] % world != rank:
            return False
        path = _part(parts, place)
        written.append(path)
        return not path.is_file()

    problem: Exception | None = None
    total = total_bytes([source for number, source in enumerate(sources) if is_read(number)])
    try:
        with bar(total) as advance:
            for piece in read_pieces(sources, encoder.key, is_wanted, is_read, advance):
                _write_part(_part(parts, piece.place), encoder.encode(piece))
    except Exception as error:
        problem = error
    found = all_gather_objects((sorted(str(path) for path in written), str(problem) if problem else None))
    if problem is not None:
        raise problem
    if problems := [text for _, text in found if text is not None]:
        raise OtherRankError(problems[0]) if not is_main_rank() else DataError(problems[0])
    return [Path(path) for path in sorted(path for paths, _ in found for path in paths)]


def _part(parts: Path, place: tuple[int, int]) -> Path:
    return parts.with_name(f"{parts.name}.{place[0]:06d}-{place[1]:08d}.npz")


def _write_part(path: Path, piece: EncodedPiece) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = piece.documents
    with sealed(path) as temporary, temporary.open("wb") as file:
        numpy.savez(
            file,
            ids=numpy.array([number for document in documents for number in document.ids], dtype=numpy.int32),
            lengths=numpy.array([len(document.ids) for document in documents], dtype=numpy.int64),
            has_mask=numpy.array([document.mask is not None for document in documents], dtype=bool),
            mask=numpy.array([flag for document in documents for flag in document.mask or ()], dtype=bool),
            digests=numpy.frombuffer(b"".join(piece.digests), dtype=numpy.uint8).reshape(-1, 16),
            numbers=numpy.array(piece.numbers, dtype=numpy.int64),
            troubles=numpy.array(json.dumps(piece.troubles)),
        )


def _join(
    asked: str | list[str], names: list[Path], prefix: Path, encoder: DocumentEncoder, sources: list[str]
) -> Counts:
    """Write the token files from the parts, and warn of what is amiss; `sources` name the places of the digests."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{prefix}.{os.getpid()}.tmp"
    suffixes = (".bin", SUFFIX, ".idx")
    num_documents, troubles, digests = 0, Counter[str](), dict[bytes, str]()
    try:
        mask = AnswerMaskWriter(Path(f"{temporary}{SUFFIX}"))
        builder = IndexedDatasetBuilder(f"{temporary}.bin", dtype=DType.optimal_dtype(encoder.num_new_tokens))
        try:
            for name in names:
                with numpy.load(name) as part:
                    _add_part({key: part[key] for key in ("ids", "lengths", "has_mask", "mask")}, builder, mask)
                    num_documents += len(part["lengths"])
                    troubles.update(json.loads(str(part["troubles"])))
                    if sources:
                        source = sources[int(name.name.rpartition(".npz")[0].rpartition(".")[2].partition("-")[0])]
                        rows = zip(part["digests"], part["numbers"], strict=True)
                        digests.update({row.tobytes(): f"{source}:{number}" for row, number in rows})
            if num_documents == 0:
                raise DataError(f"{asked} holds no document; give a JSON-lines file with a `text` field.")
            builder.finalize(f"{temporary}.idx")
        finally:
            builder.data_file.close()
            mask.close()
        if mask.num_counted == 0:
            raise DataError(f"{asked} holds no answer; a chat needs messages of the role assistant.")
        for suffix in suffixes:
            if Path(f"{temporary}{suffix}").exists():
                os.replace(f"{temporary}{suffix}", f"{prefix}{suffix}")
    finally:
        for suffix in suffixes:
            Path(f"{temporary}{suffix}").unlink(missing_ok=True)
    counted = {kind: number for kind, number in sorted(troubles.items()) if number}
    _warn(asked, counted, num_documents, encoder)
    return Counts(mask.num_tokens, mask.num_counted, num_documents, counted, digests)


def _add_part(part: dict[str, numpy.ndarray], builder: IndexedDatasetBuilder, mask: AnswerMaskWriter) -> None:
    """Append the documents of a part."""
    ids, flags = torch.from_numpy(part["ids"].astype(numpy.int64)), part["mask"].tolist()
    start = used = 0
    for length, has_mask in zip(part["lengths"].tolist(), part["has_mask"].tolist(), strict=True):
        builder.add_document(ids[start : start + length], [length])
        mask.add(length, flags[used : used + length] if has_mask else None)
        start, used = start + length, used + length * has_mask


def _warn(asked: str | list[str], troubles: dict[str, int], num_documents: int, encoder: DocumentEncoder) -> None:
    """Say what is amiss with documents, and what may be done."""
    ways = {
        SPECIAL_TOKENS: "they are tokens, as data.special_tokens=parse asks"
        if encoder.parses_special_tokens
        else "they are letters; data.special_tokens=parse makes them tokens",
        INNER_ENDS: f"token {encoder.eod} also ends parts of documents; set data.document_end to another",
    }
    for kind, number in troubles.items():
        if kind == EMPTY:
            _log.warning("%s: %s records %s.", asked, f"{number:,}", kind)
            continue
        way = f" ({ways[kind]})" if kind in ways else ""
        _log.warning("%s: %s of %s documents %s%s.", asked, f"{number:,}", f"{num_documents:,}", kind, way)
