"""Metrics in the file and on the console, read back by other means than they were written."""

import json

import pytest

from compactlm_nemo.config.run import WandbConfig, WandbMode
from compactlm_nemo.training.tracker import LOSS, SPEED, Tracker, truncate_metrics

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


@pytest.mark.parametrize("text", ["", '{"step": 0}\n', None], ids=["emptied", "one line", "no file"])
def test_metrics_that_are_gone_are_told(tmp_path, caplog, text):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with caplog.at_level("WARNING"):
        truncate_metrics(path, 0)
        assert not caplog.text, "nothing was before the first step"
        path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5)))
        truncate_metrics(path, 3)
        assert not caplog.text and len(path.read_text().splitlines()) == 3
        path.unlink() if text is None else path.write_text(text)
        truncate_metrics(path, 3)
    assert f"{2 if text else 3} lines of 3 steps are gone" in caplog.text
    caplog.clear()
    path.write_text('{"step": 0}\n{"step": 4}\n{"step": 8}\n')
    truncate_metrics(path, 8, every=4)
    assert not caplog.text, "one step in four is logged"
