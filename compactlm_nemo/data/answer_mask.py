"""The mask beside tokens, ``PREFIX.mask``: a bit a token, 1 where its prediction counts.

Bit k of byte i, from the least significant, is token 8 i + k.
A corpus of plain text has no such file: all of its tokens count. So have Megatron's files from elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

from compactlm_nemo.errors import DataError

SUFFIX = ".mask"


class AnswerMask:
    """Maps a mask into memory.

    Args:
        prefix: Of the files ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.mask``.
        num_tokens: Tokens of the corpus.
    """

    def __init__(self, prefix: Path, num_tokens: int) -> None:
        path = Path(f"{prefix}{SUFFIX}")
        if path.stat().st_size != -(-num_tokens // 8):
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, not one bit for each of {num_tokens} tokens; tokenise the "
                "corpus again, or delete it and let all tokens count."
            )
        self._bits = numpy.memmap(path, dtype=numpy.uint8, mode="r")

    def counts(self, start: int, stop: int) -> numpy.ndarray:
        """Return whether tokens `start` to `stop` count, boolean ``[stop - start]``."""
        first = start // 8
        bits = numpy.unpackbits(self._bits[first : -(-stop // 8)], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].astype(bool)


class AnswerMaskWriter:
    """Writes a mask, document by document; without a document that has a mask of its own there is no file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_tokens = self.num_counted = 0
        self._file: Any = None
        self._rest = numpy.empty(0, dtype=numpy.uint8)

    def add(self, num_tokens: int, mask: list[bool] | None) -> None:
        """Append a document of `num_tokens`; None counts all of them."""
        assert mask is None or len(mask) == num_tokens
        if mask is not None and self._file is None:
            self._file = self.path.open("wb")
            self._write(numpy.ones(self.num_tokens, dtype=numpy.uint8))
        flags = numpy.ones(num_tokens, dtype=numpy.uint8) if mask is None else numpy.array(mask, dtype=numpy.uint8)
        self.num_tokens += num_tokens
        self.num_counted += int(flags.sum())
        if self._file is not None:
            self._write(flags)

    def _write(self, flags: numpy.ndarray) -> None:
        """Write whole bytes, and keep the rest."""
        flags = numpy.concatenate([self._rest, flags])
        whole = len(flags) // 8 * 8
        self._file.write(numpy.packbits(flags[:whole], bitorder="little").tobytes())
        self._rest = flags[whole:]

    def close(self) -> None:
        """Finish the file, if there is one."""
        if self._file is not None:
            self._file.write(numpy.packbits(self._rest, bitorder="little").tobytes())
            self._file.close()
