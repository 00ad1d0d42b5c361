"""The mask beside tokens, ``PREFIX.mask``: a bit a token, 1 where its prediction counts.

Bit k of byte i, from the least significant, is token 8 i + k.
A corpus of plain text has no such file: all of its tokens count. So have Megatron's files from elsewhere.
"""

from __future__ import annotations

from pathlib import Path

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
        self.num_counted = 0
        self._file = path.open("wb")
        self._rest = numpy.empty(0, dtype=numpy.uint8)
        self._is_needed = False

    def add(self, num_tokens: int, mask: list[bool] | None) -> None:
        """Append a document of `num_tokens`; None counts all of them."""
        flags = numpy.ones(num_tokens, dtype=numpy.uint8) if mask is None else numpy.array(mask, dtype=numpy.uint8)
        assert flags.shape == (num_tokens,)
        self._is_needed |= mask is not None
        self.num_counted += int(flags.sum())
        flags = numpy.concatenate([self._rest, flags])
        whole = len(flags) // 8 * 8
        self._file.write(numpy.packbits(flags[:whole], bitorder="little").tobytes())
        self._rest = flags[whole:]

    def close(self) -> None:
        """Finish the file, or remove it where every document counts whole."""
        self._file.write(numpy.packbits(self._rest, bitorder="little").tobytes())
        self._file.close()
        if not self._is_needed:
            self.path.unlink()
