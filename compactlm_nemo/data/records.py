"""Reads documents where they lie: JSON lines, parquet, plain text, packed or not, in files, folders, the Hub.

Nothing is held but a piece: the records of a file are read one after another and cut into pieces, of which a process
takes those that are its own. Which piece a record is in depends on the files alone.
"""

from __future__ import annotations

import glob
import importlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from compactlm_nemo.errors import DataError

HUB = "hf://"
"""Begins a data set of the Hub: ``hf://ORG/NAME[/SUBSET][:SPLIT]``."""
LINES, ROWS, TEXT = (".jsonl", ".json", ".ndjson"), (".parquet",), (".txt",)
PACKED = (".gz", ".bz2", ".xz", ".zst")
LONGEST_BYTES = 2**26
"""Most bytes of a line, and of a document that is a file."""
PIECE_RECORDS, PIECE_BYTES = 4096, 2**25
"""A piece ends when it has either, bytes unpacked; `PIECE_BYTES` does not bound rows of tables."""
EXTRA = "pip install 'compactlm-nemo[texts]'"


class Record(NamedTuple):
    """One document as it was written."""

    fields: dict[str, Any]
    """Its keys; a plain text file is one record, its text under the key that is asked for."""
    number: int
    """Of its line or row, from 1."""


class Piece(NamedTuple):
    """Neighbouring records of one file, or of one data set of the Hub."""

    source: str
    place: tuple[int, int]
    """Number of the source, and of the piece in it."""
    records: list[Record]

    def where(self, number: int) -> str:
        """Return what names a line or a row to people."""
        return f"{self.source}:{number}"


class _Raw(NamedTuple):
    number: int
    size: int
    value: bytes | dict[str, Any]


def is_hub(source: str) -> bool:
    """Whether a source is a data set of the Hub."""
    return source.startswith(HUB)


def sources_of(path: str | list[str]) -> list[str]:
    """Return the files of a path, in order of their names, and the data sets of the Hub; of a list one after another.

    A folder has the files below it whose names end as texts do; hidden ones are passed over. A path that is no file,
    folder or glob comes back as it is, for the message that it does not exist.
    """
    sources: list[str] = []
    for each in [path] if isinstance(path, str) else path:
        if is_hub(each) or Path(each).is_file():
            sources.append(each)
        elif Path(each).is_dir():
            files = (p for p in Path(each).rglob("*") if not any(q.startswith(".") for q in p.relative_to(each).parts))
            sources += sorted(str(file) for file in files if file.is_file() and _is_text(file))
        elif glob.has_magic(each):
            sources += sorted(file for file in glob.glob(each, recursive=True) if Path(file).is_file())
        else:
            sources.append(each)
    return sources


def missing_sources(path: str | list[str]) -> list[str]:
    """Return those of a path, or of its list, that name nothing that can be read."""
    each = [path] if isinstance(path, str) else path
    return [one for one in each if not is_hub(one) and not any(Path(s).is_file() for s in sources_of(one))]


def total_bytes(sources: list[str]) -> int:
    """Return the bytes of all files, as they lie on disk."""
    return sum(Path(source).stat().st_size for source in sources if not is_hub(source))


def read_pieces(
    sources: list[str],
    key: str = "text",
    is_wanted: Callable[[tuple[int, int]], bool] = lambda place: True,
    is_read: Callable[[int], bool] = lambda number: True,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Piece]:
    """Yield the pieces of all sources, in order.

    Args:
        key: Where the text of a plain text file goes.
        is_wanted: Tells by its place whether a piece is yielded; others are read past, not parsed.
        is_read: Tells by its number whether a source is opened at all.
        advance: Called with the bytes on disk that were read since the last call.
    Raises:
        DataError: a source cannot be read, a line is no JSON object or too long; the message names file and line.
    """
    for number, source in enumerate(sources):
        for idx, raw in enumerate(_cut(_read(source, key, advance)) if is_read(number) else ()):
            if is_wanted((number, idx)):
                yield Piece(source, (number, idx), [_record(source, each) for each in raw])


def _cut(raw: Iterator[_Raw]) -> Iterator[list[_Raw]]:
    piece: list[_Raw] = []
    num_bytes = 0
    for each in raw:
        piece.append(each)
        num_bytes += each.size
        if len(piece) == PIECE_RECORDS or num_bytes >= PIECE_BYTES:
            yield piece
            piece, num_bytes = [], 0
    if piece:
        yield piece


def _record(source: str, raw: _Raw) -> Record:
    if isinstance(raw.value, dict):
        return Record(raw.value, raw.number)
    try:
        fields = json.loads(raw.value.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}:{raw.number} is no JSON ({error}); every line must be a JSON object.") from None
    if not isinstance(fields, dict):
        way = "write an object a line, as `jq -c '.[]'` does" if isinstance(fields, list) else "every line must be one"
        raise DataError(f"{source}:{raw.number} is no JSON object; {way}.")
    return Record(fields, raw.number)


def _read(source: str, key: str, advance: Callable[[int], None]) -> Iterator[_Raw]:
    if is_hub(source):
        yield from _hub_rows(source)
        return
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source} does not exist; give a JSON-lines file with a `text` field.")
    kind = _kind(path)
    if kind in ROWS:
        yield from _table_rows(path, advance)
        return
    with _opened(path, advance) as file:
        yield from _file_text(path, file, key) if kind in TEXT else _lines(path, file)


def _lines(path: Path, file: io.BufferedReader) -> Iterator[_Raw]:
    number = 0
    while line := file.readline(LONGEST_BYTES + 1):
        number += 1
        if len(line) > LONGEST_BYTES:
            raise DataError(
                f"{path}:{number} is a line of more than {LONGEST_BYTES / 2**20:g} MiB; split that document, or "
                "look whether the file holds lines at all."
            )
        if line.strip():
            yield _Raw(number, len(line), line)


def _file_text(path: Path, file: io.BufferedReader, key: str) -> Iterator[_Raw]:
    text = file.read(LONGEST_BYTES + 1)
    if len(text) > LONGEST_BYTES:
        raise DataError(
            f"{path} is one document of more than {LONGEST_BYTES / 2**20:g} MiB; split it into files, or write JSON "
            "lines."
        )
    try:
        yield _Raw(1, len(text), {key: text.decode("utf-8")})
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 ({error}); convert it, as `iconv -t utf-8` does.") from None


@contextmanager
def _opened(path: Path, advance: Callable[[int], None]) -> Iterator[Any]:
    """Yield the unpacked bytes of a file, and turn what goes wrong while they are read into one line."""
    import lzma
    import zlib

    try:
        with path.open("rb") as file:
            counted = _Counted(file, advance)
            with io.BufferedReader(_unpacked(path, counted), 2**20) as unpacked:
                yield unpacked
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch or pack it again.") from None


def _unpacked(path: Path, file: _Counted) -> Any:
    """Return a raw stream of the unpacked bytes; a file that unpacks without end is never held."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return gzip.GzipFile(fileobj=io.BufferedReader(file, 2**20))
    if suffix == ".bz2":
        import bz2

        return bz2.BZ2File(io.BufferedReader(file, 2**20))
    if suffix == ".xz":
        import lzma

        return lzma.LZMAFile(io.BufferedReader(file, 2**20))
    if suffix == ".zst":
        arrow = library("pyarrow", str(path))
        return arrow.CompressedInputStream(arrow.PythonFile(io.BufferedReader(file, 2**20), mode="r"), "zstd")
    return file


class _Counted(io.RawIOBase):
    """Tells how many bytes were read."""

    def __init__(self, file: Any, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = int(self._file.readinto(buffer))
        self._advance(num_bytes)
        return num_bytes


def _table_rows(path: Path, advance: Callable[[int], None]) -> Iterator[_Raw]:
    """Yield the rows of a parquet file; memory holds a batch of a row group."""
    arrow = library("pyarrow", str(path))
    parquet = importlib.import_module("pyarrow.parquet")
    number, told, size = 0, 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield _Raw(number, 0, row)
                read = size * number // max(1, table.metadata.num_rows)
                advance(read - told)
                told = read
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{path} cannot be read as parquet, behind row {number} ({reason}); fetch it again.") from None


def _hub_rows(source: str) -> Iterator[_Raw]:
    """Yield the rows of a data set, which `datasets` downloads once and maps into memory."""
    datasets = library("datasets", source)
    name, _, split = source.removeprefix(HUB).partition(":")
    subset = None
    if name.count("/") == 2:
        name, _, subset = name.rpartition("/")
    try:
        rows = datasets.load_dataset(name, subset, split=split or "train")
    except Exception as error:  # the library and those below it raise errors of many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{source} cannot be loaded ({reason}); check its name, subset, split and access.") from None
    for number, row in enumerate(rows, start=1):
        yield _Raw(number, 0, row)


def library(name: str, source: str) -> Any:
    """Return a library that only some sources need.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{source} needs {name}, which is not installed; {EXTRA}.") from None


def _kind(path: Path) -> str:
    suffix = path.with_suffix("").suffix if path.suffix.lower() in PACKED else path.suffix
    return suffix.lower()


def _is_text(path: Path) -> bool:
    return _kind(path) in LINES + TEXT or path.suffix.lower() in ROWS
