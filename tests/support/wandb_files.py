"""A reader of the files that W&B writes offline, which shares nothing with the package's own."""

import json
import struct
import time


def wandb_payloads(data: bytes):
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB after a header of 7 bytes."""
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)  # kind: 1 full, 2 first, 3 middle, 4 last
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_records(folder):
    """Every record of every offline run below the folder, oldest run first."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime):
        for payload in wandb_payloads(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            records.append(record)
    return records


def finished_records(folder, num_runs):
    """`wandb_records` once every run has its exit: W&B's process writes the end of a file after `finish` returns."""
    deadline = time.monotonic() + 120
    while True:
        records = wandb_records(folder)
        if sum(record.HasField("exit") for record in records) == num_runs:
            return records
        assert time.monotonic() < deadline, "a run has no exit record"
        time.sleep(0.05)


def history_rows(records):
    """The rows of metrics among the records, W&B's own `_step` included."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]


def config_of(run):
    """The configuration that a run's record holds."""
    return {item.key: json.loads(item.value_json) for item in run.config.update}
