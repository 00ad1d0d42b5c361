"""Metrics in the file, on the console and in the W&B record, read back by other means than they were written."""

import json
import logging
import struct
import sys
import time

import pytest

from compactlm_nemo.config.run import WandbConfig, WandbMode
from compactlm_nemo.training.tracker import LOSS, SPEED, Tracker, truncate_metrics, wandb_mode

OFF = WandbConfig(mode=WandbMode.disabled)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_json_line_a_step(tmp_path):
    with Tracker(tmp_path / "distill", OFF, {}, True, 3) as tracker:
        tracker.log(0, {"train/loss": 2.5})
        assert read_lines(tmp_path / "distill") == [{"step": 0, "train/loss": 2.5}]  # before the end: flushed
        tracker.log(1, {"train/loss": float("nan"), "lr": 1})
    assert read_lines(tmp_path / "distill")[1] == {"step": 1, "train/loss": None, "lr": 1.0}


def test_other_ranks_write_nothing(tmp_path):
    with Tracker(tmp_path / "distill", WandbConfig(mode=WandbMode.offline), {}, False, 3) as tracker:
        tracker.log(0, {"train/loss": 2.5})
    assert list(tmp_path.iterdir()) == []


def test_truncate_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 2)
    assert not path.exists()
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 1, "lo')
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_resume_continues_the_file(tmp_path):
    with Tracker(tmp_path, OFF, {}, True, 6) as tracker:
        for step in range(4):
            tracker.log(step, {"v": 1.0})
    with Tracker(tmp_path, OFF, {}, True, 6, start_step=2) as tracker:
        for step in range(2, 6):
            tracker.log(step, {"v": 2.0})
    assert [(line["step"], line["v"]) for line in read_lines(tmp_path)] == [
        (0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0)
    ]  # fmt: skip


def test_about_ten_plain_lines_without_a_terminal(tmp_path, capsys):
    with Tracker(tmp_path, OFF, {}, True, 200) as tracker:
        for step in range(200):
            tracker.log(step, {LOSS: 3.25, SPEED: 12345.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{20 * k}/200" for k in range(1, 11)]
    assert "loss 3.2500" in lines[0] and "12,345 tokens/s" in lines[0] and lines[-1].endswith("0:00:00 left")


def test_auto_is_online_only_with_a_login(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_mode(WandbMode.auto) == "disabled"
    (tmp_path / ".netrc").write_text("machine other.example\n")
    assert wandb_mode(WandbMode.auto) == "disabled"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n")
    assert wandb_mode(WandbMode.auto) == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode(WandbMode.auto) == "online"
    assert wandb_mode(WandbMode.offline) == "offline"


def test_training_goes_on_when_wandb_does_not_start(tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")

    def fail(**_):
        raise wandb.errors.CommError("no network\nsecond line")

    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        with Tracker(tmp_path, WandbConfig(mode=WandbMode.offline), {}, True, 1) as tracker:
            tracker.log(0, {"train/loss": 1.0})
    (record,) = [record for record in caplog.records if "W&B did not start" in record.getMessage()]
    assert "no network" in record.getMessage() and "\n" not in record.getMessage()
    assert len(read_lines(tmp_path)) == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(tmp_path, WandbConfig(mode=WandbMode.offline), {}, True, 1) as tracker:
        tracker.log(0, {"train/loss": 1.0})


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
    deadline = time.monotonic() + 30
    while True:
        records = wandb_records(folder)
        if sum(record.HasField("exit") for record in records) == num_runs:
            return records
        assert time.monotonic() < deadline, "a run has no exit record"
        time.sleep(0.05)


def test_offline_run_holds_metrics_config_and_one_id(tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "my-run" / "distill"
    cfg = WandbConfig(mode=WandbMode.offline, project="proj")
    with Tracker(folder, cfg, {"distill": {"lr": 0.5}}, True, 4) as tracker:
        tracker.log(0, {"train/loss": 3.0})
        tracker.log(1, {"train/loss": 2.0})
    with Tracker(folder, cfg, {"distill": {"lr": 0.5}}, True, 4, start_step=1) as tracker:
        tracker.log(1, {"train/loss": 1.0})
    records = finished_records(folder, num_runs=2)
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.run_id for run in runs} == {(folder / "wandb_id").read_text().strip()}
    assert runs[0].project == "proj" and runs[0].display_name == "my-run"
    assert {item.key: json.loads(item.value_json) for item in runs[0].config.update}["distill"] == {"lr": 0.5}
    logged = []
    for record in records:
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            logged.append((row["step"], row["train/loss"]))
    assert logged == [(0, 3.0), (1, 2.0), (1, 1.0)]
    with Tracker(folder, cfg, {}, True, 4):
        pass
    assert (folder / "wandb_id").read_text().strip() != runs[0].run_id
