"""A training that is online at W&B, on good and bad days of the server, goes on; a later process makes W&B whole.

The server is tests/support/wandb_server.py; W&B's own client and service talk to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from compactlm_nemo.config.load import CONF
from tests.support.wandb_server import WandbServer

STEPS, TURN = 12, 5
FINISH_SECONDS = 4
PATIENT, IMPATIENT = 90, 6
"""W&B's own wait for the server at the start, and one for a server of which the test knows that it does not answer."""
PROCESS = """
import json, os, signal, sys, time, urllib.request, psutil
from pathlib import Path
from compactlm_nemo.config.run import WandbConfig, WandbMode
from compactlm_nemo.training.tracker import Tracker
folder, start, stop, turn, mood = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
cfg, seconds = WandbConfig(mode=WandbMode.online).named("runs/first", "distill"), {}
import wandb  # its import is none of the delay
began = time.monotonic()
with Tracker(folder, cfg, {}, True, 12, start_step=start) as tracker:
    seconds["start"] = time.monotonic() - began
    longest = 0.0
    for step in range(start, stop):
        if step == turn:
            urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/mood/" + mood, data=b"")
        began = time.monotonic()
        tracker.log(step, {"v": float(step)})
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.02)
    (folder / "children").write_text(json.dumps([p.pid for p in psutil.Process().children(recursive=True)]))
    if mood == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
seconds |= {"step": longest, "finish": time.monotonic() - began}
(folder / "seconds").write_text(json.dumps(seconds))
"""
"""A process of a training: folder, first step, end, step at which the server's mood turns, mood (or kill: itself)."""


@dataclass
class Ended:
    """How a process of a training ended."""

    code: int
    err: str
    seconds: dict[str, float]


@pytest.fixture
def server() -> Iterator[Callable[[str], WandbServer]]:
    made: list[WandbServer] = []

    def make(mood: str) -> WandbServer:
        made.append(WandbServer(mood))
        return made[-1]

    yield make
    for each in made:
        if each.mood != "gone":
            each.close()


def begin(
    folder: Path, url: str, start: int = 0, stop: int = STEPS, turn: int = -1, mood: str = "up", wait: int = PATIENT
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"PYTHONPATH": str(CONF.parent), "WANDB_BASE_URL": url, "WANDB_API_KEY": "0123456789" * 4}
    env |= {"WANDB_INIT_TIMEOUT": str(wait), "WANDB_FINISH_TIMEOUT": str(FINISH_SECONDS)}
    words = [sys.executable, "-c", PROCESS, str(folder), str(start), str(stop), str(turn), mood]
    return subprocess.Popen(words, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str], folder: Path) -> Ended:
    _, err = process.communicate(timeout=200)
    told = folder / "seconds"
    return Ended(process.returncode, err, json.loads(told.read_text()) if told.is_file() else {})


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_id(folder: Path) -> str:
    return (folder / "wandb_id").read_text().strip()


def assert_nobody_is_left(folder: Path) -> None:
    """The processes that the training had are gone soon after it."""
    until = time.monotonic() + 30
    for pid in json.loads((folder / "children").read_text()):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until, psutil.Process(pid).cmdline()
            time.sleep(0.1)


def test_the_server_has_every_step_once_over_a_kill_and_a_requeue(
    tmp_path: Path, server: Callable[[str], WandbServer]
) -> None:
    up = server("up")
    end(begin(tmp_path, up.url, stop=6, mood="kill"), tmp_path)
    assert_nobody_is_left(tmp_path)
    ended = end(begin(tmp_path, up.url, start=4, stop=9), tmp_path)
    assert ended.code == 0 and "training goes on" not in ended.err, ended.err
    assert up.steps(run_id(tmp_path)) == list(range(9))
    ended = end(begin(tmp_path, up.url, start=8), tmp_path)
    assert ended.code == 0 and up.steps(run_id(tmp_path)) == list(range(STEPS)), ended.err
    assert "will be ignored" not in ended.err, ended.err  # what W&B says of steps that it has
    rows = up.rows[run_id(tmp_path)]
    assert [row["v"] for row in rows.values()] == list(range(STEPS)) and len(up.runs) == 1
    sent = up.runs[run_id(tmp_path)]
    assert (sent["displayName"], sent["groupName"], sent["jobType"]) == ("first", "first", "distill")


def test_a_bad_start_is_one_warning_and_a_bounded_delay(tmp_path: Path, server: Callable[[str], WandbServer]) -> None:
    servers = {mood: server(mood) for mood in ("gone", "error", "hang")}
    processes = {mood: begin(tmp_path / mood, each.url, wait=IMPATIENT) for mood, each in servers.items()}
    for mood, process in processes.items():
        folder = tmp_path / mood
        ended = end(process, folder)
        assert ended.code == 0, ended.err
        assert ended.err.count("training goes on without it") == 1 and "did not start" in ended.err, ended.err
        assert "Traceback" not in ended.err
        assert steps_in(folder) == list(range(STEPS))
        assert ended.seconds["start"] < IMPATIENT + 30 and ended.seconds["finish"] < 10, ended.seconds
        assert_nobody_is_left(folder)
    for mood in ("error", "hang"):  # the network is back
        servers[mood].mood = "up"
        servers[mood]._wakes_up.set()
    processes = {mood: begin(tmp_path / mood, servers[mood].url, start=STEPS) for mood in ("error", "hang")}
    for mood, process in processes.items():
        ended = end(process, tmp_path / mood)
        assert ended.code == 0 and servers[mood].steps(run_id(tmp_path / mood)) == list(range(STEPS)), ended.err


def test_a_server_that_fails_in_the_middle_holds_up_no_step(
    tmp_path: Path, server: Callable[[str], WandbServer]
) -> None:
    servers = {mood: server("up") for mood in ("gone", "error", "hang")}
    processes = {mood: begin(tmp_path / mood, each.url, turn=TURN, mood=mood) for mood, each in servers.items()}
    for mood, process in processes.items():
        folder = tmp_path / mood
        ended = end(process, folder)
        assert ended.code == 0, ended.err
        assert ended.err.count("training goes on without it") == 1 and "did not finish" in ended.err, ended.err
        assert steps_in(folder) == list(range(STEPS))
        assert ended.seconds["step"] < 10 and ended.seconds["finish"] < FINISH_SECONDS + 20, ended.seconds
        assert_nobody_is_left(folder)
    for mood in ("error", "hang"):
        servers[mood].mood = "up"
        servers[mood]._wakes_up.set()
    processes = {mood: begin(tmp_path / mood, servers[mood].url, start=STEPS) for mood in ("error", "hang")}
    for mood, process in processes.items():
        ended = end(process, tmp_path / mood)
        assert ended.code == 0 and servers[mood].steps(run_id(tmp_path / mood)) == list(range(STEPS)), ended.err
