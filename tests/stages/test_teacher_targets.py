"""Shards that threads encode and write are those of one thread, in order, and no failure is lost."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from compactlm_nemo.distill.stored_targets import shard_path, write_shard
from compactlm_nemo.errors import DataError
from compactlm_nemo.stages import teacher_targets
from compactlm_nemo.stages.teacher_targets import ShardWriter


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_targets, "num_workers", lambda: 3)


def encoded(shard: int, row: int) -> bytes:
    """A record whose encoding takes the longer the earlier it is."""
    time.sleep(0.004 * (3 - row))
    return bytes([shard, row]) * (row + 1)


def test_shards_are_those_of_one_thread_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    before = set(threading.enumerate())
    with closing(ShardWriter(tmp_path / "many")) as writer:
        for shard in (0, 1, 5):
            records = [writer.encode(lambda shard=shard, row=row: encoded(shard, row)) for row in range(4)]
            writer.write(shard, records[:3])  # the last one only fills the batch
        writer.finish()
        assert len(list((tmp_path / "many").glob("shard_*"))) == 3
    assert set(threading.enumerate()) <= before
    for shard in (0, 1, 5):
        write_shard(tmp_path / "one", shard, [bytes([shard, row]) * (row + 1) for row in range(3)])
        assert shard_path(tmp_path / "many", shard).read_bytes() == shard_path(tmp_path / "one", shard).read_bytes()
    times = [shard_path(tmp_path / "many", shard).stat().st_mtime_ns for shard in (0, 1, 5)]
    assert times == sorted(times)


def test_the_teacher_waits_when_too_many_records_are_in_line(tmp_path: Path) -> None:
    gate, begun = threading.Event(), list[int]()

    def blocked(row: int) -> bytes:
        begun.append(row)
        assert gate.wait(10)
        return b"x"

    submitted = list[int]()
    with closing(ShardWriter(tmp_path)) as writer:

        def run() -> None:
            for row in range(30):
                writer.encode(lambda row=row: blocked(row))  # type: ignore[misc]
                submitted.append(row)

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.2)
        assert len(begun) == 3 and len(submitted) == 9  # three at work, two a thread in line
        gate.set()
        thread.join(10)
        assert len(submitted) == 30


def test_what_an_encoder_raises_ends_the_stage(tmp_path: Path) -> None:
    def fails() -> bytes:
        raise DataError("sample 4 has no tokens")

    with pytest.raises(DataError, match="^sample 4 has no tokens$"), closing(ShardWriter(tmp_path)) as writer:
        writer.write(0, [writer.encode(lambda: b"good"), writer.encode(fails)])
        writer.write(1, [writer.encode(lambda: b"good")])
        writer.finish()
    assert not shard_path(tmp_path, 0).exists()
