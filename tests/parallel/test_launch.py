"""What one rank does alone, the others wait for or fail with."""

from __future__ import annotations

from pathlib import Path

import pytest

from compactlm_nemo.errors import CompactLMError, DataError
from compactlm_nemo.parallel.launch import main_rank_writes
from tests.support.ranks import run_ranks


def _write(rank: int, world: int, folder: Path) -> None:
    with main_rank_writes() as writes:
        assert writes == (rank == 0)
        if writes:
            (folder / "file").write_text("done")
    assert (folder / "file").read_text() == "done"


def _fail(rank: int, world: int) -> None:
    with pytest.raises(CompactLMError, match="no such text") as caught:
        with main_rank_writes() as writes:
            if writes:
                raise DataError("no such text")
    assert isinstance(caught.value, DataError) == (rank == 0)


def test_the_others_see_what_the_main_rank_wrote(tmp_path: Path) -> None:
    run_ranks(_write, 2, tmp_path, tmp_path)


def test_an_error_of_the_main_rank_ends_all_of_them(tmp_path: Path) -> None:
    run_ranks(_fail, 2, tmp_path)
