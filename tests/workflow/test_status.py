"""`recipes.status` says how a run stands, from its files and Slurm's word, in a second and without torch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF, STATUS, compose_root
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.workflow.owner import owned
from compactlm_nemo.workflow.status import status
from tests.support import commands
from tests.support.slurm import write_script
from tests.support.tiny_run import command

SQUEUE = """#!/bin/bash
{sleep}
cat <<'END'
12|compress-run|RUNNING|2|1:02:03|2026-11-26T17:00:00|None|{run}
13|compress-run|PENDING|2|4:00:00|N/A|Dependency|{run}
14|other|RUNNING|1|0:01|2026-11-26T17:00:00|None|/another/run
15|by-hand|RUNNING|1|0:09|2026-11-26T17:00:00|None|(null)
END
"""


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training was stopped after 4 of 6 steps."""
    run = tmp_path_factory.mktemp("status") / "run"
    done = commands.run(command(inputs, run, "distill.stop_after=4", recipe="distill"))
    assert done.returncode == 2, "what is before it is missing"
    for recipe in ("import_model", "tokenize", "score", "search", "prune", "distill"):
        done = commands.run(command(inputs, run, "distill.stop_after=4", recipe=recipe))
        assert done.returncode == 0, done.stderr
    return run


def _lines(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    status(compose_root(STATUS, [f"run.dir={run}"]))
    return capsys.readouterr().out.splitlines()


def test_stages_that_are_done_and_the_training_under_way(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    *done, training, owner = _lines(run, capsys)
    assert [line.split(" ")[:2] for line in done] == [
        [f"{name}:", "done"] for name in ("import_model", "tokenize", "score", "search", "prune")
    ]
    metrics = run / "progress" / "distill" / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[3])
    # 4 windows of 16 tokens a step, 4 of 6 steps; two steps of 64 tokens are left.
    left = round(2 * 64 / last["perf/tokens_per_second"])
    told = f"distill: step 4 of 6, 256 of 384 tokens, loss {last['train/loss']:.4f}, "
    told += (
        f"{last['perf/tokens_per_second']:,.0f} tokens/s, 0:{left // 60:02}:{left % 60:02} of training left, last step "
    )
    assert training.startswith(told)
    assert owner == "nobody works here"
    text = metrics.read_text()
    metrics.write_text(text + '{"step": 4, "train/lo')  # as a kill leaves it
    assert _lines(run, capsys)[-2].startswith(told)
    metrics.write_text(text)


def test_who_works_there_is_told_alive_or_killed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    host = socket.gethostname()
    with owned(run):
        assert _lines(run, capsys)[-1].startswith(f"at work: process {os.getpid()} on {host}, since 20")
        text = (run / ".owner").read_text()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (run / ".owner").write_text(json.dumps(json.loads(text) | {"pid": ended.pid, "job": "7"}))
    assert _lines(run, capsys)[-1].startswith(f"nobody works here; killed was process {ended.pid} on {host}, job 7")
    (run / ".owner").write_text(json.dumps(json.loads(text) | {"host": "n7"}))
    assert _lines(run, capsys)[-1].endswith(", unless it was killed")
    (run / ".owner").write_text("")


def test_jobs_of_the_run_are_told_and_no_others(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    write_script(tmp_path / "bin" / "squeue", SQUEUE, run=str(run), sleep="")
    (run / ".owner").write_text(json.dumps({"host": "n7", "pid": 3, "job": "15", "time": "now"}))
    assert _lines(run, capsys)[-3:] == [
        "job 12 (compress-run): running on 2 nodes, 1:02:03 left",
        "job 13 (compress-run): pending on 2 nodes, Dependency, start N/A",
        "job 15 (by-hand): running on 1 nodes, 0:09 left",
    ]
    (run / ".owner").write_text("")
    write_script(tmp_path / "bin" / "squeue", SQUEUE, run=str(run), sleep="exec sleep 60")
    monkeypatch.setattr("compactlm_nemo.workflow.status.SQUEUE_SECONDS", 0.1)
    assert _lines(run, capsys)[-1] == "jobs: unknown, squeue did not answer within 0.1 s"


def test_candidates_and_rounds_are_told_without_the_stages_they_share(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole, manifest = tmp_path / "whole", {"results": {"loss": 2.5, "tokens": 4096}}
    for folder in ("score", "rank/0/student", "rank/0/distill", "rank/1/student", "round_1/score"):
        (whole / folder).mkdir(parents=True)
        (whole / folder / "manifest.json").write_text(json.dumps(manifest if "distill" in folder else {}))
    (whole / "rank" / "0" / "score").symlink_to("../../score")
    names = [line.partition(": done ")[0] for line in _lines(whole, capsys)]
    assert names[:5] == ["score", "rank/0 prune", "rank/0 distill", "rank/1 prune", "round_1 score"]
    told = next(line for line in _lines(whole, capsys) if line.startswith("rank/0 distill"))
    assert told.endswith(" ago, 4,096 tokens, held-out loss 2.5000 nats a token")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run and no job waits for it"):
        status(compose_root(STATUS, [f"run.dir={tmp_path}"]))


def test_it_takes_less_than_a_second(run: Path, tmp_path: Path) -> None:
    """Of a processor's time, as other work may hold this machine's."""
    words = [sys.executable, "-m", "recipes.status", f"run.dir={run}"]
    before = os.times()
    start = time.monotonic()
    subprocess.run(words, cwd=CONF.parent, check=True, capture_output=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert time.monotonic() - start < 20
