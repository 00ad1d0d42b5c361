"""One W&B run over all processes of a training: what its files hold is read by another reader than the package's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from compactlm_nemo.config.load import CONF, compose
from compactlm_nemo.config.run import WandbConfig, WandbMode
from compactlm_nemo.training.tracker import Tracker
from compactlm_nemo.training.wandb_run import BATCH, _payloads, _steps_in, wandb_mode
from compactlm_nemo.workflow.rank import candidate_config
from tests.support.wandb_files import config_of, finished_records, history_rows, wandb_payloads

OFFLINE = WandbConfig(mode=WandbMode.offline, project="proj")
STEPS, WIDTH = 16, 150
PROCESS = """
import json, os, signal, sys
from pathlib import Path
from compactlm_nemo.config.run import WandbConfig, WandbMode
from compactlm_nemo.training.tracker import Tracker
start, stop, end = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
cfg = WandbConfig(mode=WandbMode.offline)
with Tracker(Path(sys.argv[1]), cfg, {}, True, 16, start_step=start) as tracker:
    for step in range(start, stop):
        tracker.log(step, {f"m/{i}": 1000.0 * step + i for i in range(150)})
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "error":
        raise SystemExit(1)
"""
"""A process of a training: folder, first step, step at which it ends, how it ends."""


@pytest.fixture(autouse=True)
def no_words_of_wandb_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    yield
    wandb.teardown()


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_process(folder: Path, start: int, stop: int, end: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    words = [sys.executable, "-c", PROCESS, str(folder), str(start), str(stop), end]
    return subprocess.run(words, env=env, capture_output=True, text=True)


def test_every_metric_of_every_step_is_there_once_over_three_requeues(tmp_path: Path) -> None:
    """A kill leaves a file without its end, an error one that is ahead of the checkpoint; both are made good."""
    run_process(tmp_path, 0, 3, "kill")
    run_process(tmp_path, 2, 9, "error")
    run_process(tmp_path, 6, 13, "kill")
    last = run_process(tmp_path, 10, STEPS, "finish")
    assert last.returncode == 0, last.stderr
    records = finished_records(tmp_path, num_runs=2)
    assert len(list(tmp_path.rglob("offline-run-*/*.wandb"))) == 4
    assert {record.run.run_id for record in records if record.HasField("run")} == {
        (tmp_path / "wandb_id").read_text().strip()
    }
    rows = history_rows(records)
    seen = Counter((row["step"], name) for row in rows for name in row if name.startswith("m/"))
    assert seen == Counter({(step, f"m/{i}"): 1 for step in range(STEPS) for i in range(WIDTH)})
    assert all(row[f"m/{i}"] == 1000.0 * row["step"] + i for row in rows for i in (0, 149))
    assert [row["_step"] for row in rows] == [row["step"] for row in rows] == list(range(STEPS))
    [folders] = [line.partition("wandb sync ")[2] for line in last.stdout.splitlines() if "wandb sync" in line]
    assert len(list(Path("/").glob(folders.lstrip("/")))) == 4


def test_the_package_reads_its_parts_as_far_as_they_are_whole(tmp_path: Path) -> None:
    run_process(tmp_path, 0, 12, "finish")
    [path] = tmp_path.rglob("offline-run-*/*.wandb")
    finished_records(tmp_path, num_runs=1)
    data = path.read_bytes()
    assert len(data) > 32768  # records that are cut into pieces at the ends of blocks
    assert list(_payloads(data)) == list(wandb_payloads(data))
    assert list(_steps_in(path)) == list(range(12))
    path.write_bytes(data[: len(data) // 2])
    assert 0 < len(list(_steps_in(path))) < 12


def test_steps_after_a_rewind_follow_with_their_own_batches(tmp_path: Path) -> None:
    with Tracker(tmp_path, OFFLINE, {}, True, 6) as tracker:
        for step in range(4):
            tracker.log(step, {BATCH: step, "v": 0.0})
        tracker.rewind(2)
        for step in range(2, 6):  # the spike was in batch 4
            tracker.log(step, {BATCH: step + 3, "v": 1.0})
    rows = history_rows(finished_records(tmp_path, num_runs=1))
    assert [(row["_step"], row["step"], row["v"]) for row in rows] == [
        (0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 0), (5, 2, 1), (6, 3, 1), (7, 4, 1), (8, 5, 1)
    ]  # fmt: skip
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(6))


def test_a_run_that_starts_late_is_sent_the_whole_training(tmp_path: Path) -> None:
    with Tracker(tmp_path, WandbConfig(mode=WandbMode.disabled), {}, True, 4) as tracker:
        tracker.log(0, {"v": 3.0})
        tracker.log(1, {"v": float("nan")})
    with Tracker(tmp_path, OFFLINE, {}, True, 4, start_step=2) as tracker:
        tracker.log(2, {"v": 1.0})
    rows = history_rows(finished_records(tmp_path, num_runs=1))
    assert [(row["step"], row["v"]) for row in rows] == [(0, 3.0), (1, "NaN"), (2, 1.0)] or rows[1]["v"] != rows[1]["v"]


def test_the_config_and_the_words_of_the_settings_are_sent_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    for word in ("PROJECT", "NAME", "ENTITY", "RUN_GROUP", "JOB_TYPE", "NOTES", "TAGS"):
        monkeypatch.setenv(f"WANDB_{word}", f"env-{word.lower()}")
    wandb.teardown()  # W&B reads its environment once a process
    given = WandbConfig(
        mode=WandbMode.offline, project="p", name="n", entity="e", group="g", job_type="j", notes="o", tags=["t", "u"]
    )
    for folder, cfg in (("env", WandbConfig(mode=WandbMode.offline)), ("set", given)):
        with Tracker(
            tmp_path / folder, cfg.named("runs/first", "distill"), {"distill": {"lr": 0.5}}, True, 1
        ) as tracker:
            tracker.log(0, {"v": 1.0})
        records = finished_records(tmp_path / folder, num_runs=1)
        [run] = [record.run for record in records if record.HasField("run")]
        words = (run.project, run.display_name, run.entity, run.run_group, run.job_type, run.notes, sorted(run.tags))
        if cfg is given:
            assert words == ("p", "n", "e", "g", "j", "o", ["t", "u"])
        else:
            assert words == (
                "env-project", "env-name", "env-entity", "env-run_group", "env-job_type", "env-notes", ["env-tags"]
            )  # fmt: skip
        assert config_of(run)["distill"] == {"lr": 0.5}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"0123456789" * 4 not in path.read_bytes() and b"hf_canary" not in path.read_bytes(), path


def test_words_that_nobody_gives_come_from_the_run() -> None:
    cfg = WandbConfig().named("runs/first", "distill")
    assert (cfg.project, cfg.name, cfg.group, cfg.job_type) == ("compactlm", "first", "first", "distill")
    assert cfg.entity is None and cfg.notes is None and cfg.tags == [] and cfg.parent is None


def test_candidates_are_in_the_group_of_their_run_and_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(
        ["run.dir=runs/big", "rank.candidates=2", "model.source=m", "data.train.a=a.jsonl", "data.heldout.a=b.jsonl"]
    )
    got = [candidate_config(config, index).wandb for index in (0, 1)]
    assert [cfg.name for cfg in got] == ["big-rank-0", "big-rank-1"]
    assert {(cfg.group, cfg.job_type, cfg.parent) for cfg in got} == {("big", "rank", "big")}
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep")
    monkeypatch.setenv("WANDB_NAME", "mine")
    cfg = candidate_config(config, 1).wandb.named("runs/big/rank/1", "distill")
    assert (cfg.name, cfg.group, cfg.job_type, cfg.parent) == ("mine-rank-1", "sweep", "rank", "mine")


def test_auto_heeds_the_environment_then_asks_for_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode(WandbMode.auto) == "disabled"
    (tmp_path / ".netrc").write_text("machine other.example\n")
    assert wandb_mode(WandbMode.auto) == "disabled"
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert wandb_mode(WandbMode.auto) == "online"
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n")
    assert wandb_mode(WandbMode.auto) == "online"
    for word, mode in {"offline": "offline", "dryrun": "offline", "disabled": "disabled", "online": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", word)
        assert wandb_mode(WandbMode.auto) == mode
    assert wandb_mode(WandbMode.offline) == "offline"
    assert not caplog.records
    monkeypatch.setenv("WANDB_MODE", "shared")
    assert wandb_mode(WandbMode.auto) == "disabled" and "WANDB_MODE=shared" in caplog.text
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode(WandbMode.auto) == "online"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("compactlm")]


def test_training_goes_on_when_wandb_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: Any) -> None:
        raise wandb.errors.CommError("no network\nsecond line")

    monkeypatch.setattr(wandb, "init", fail)
    with Tracker(tmp_path, OFFLINE, {}, True, 1) as tracker:
        tracker.log(0, {"train/loss": 1.0})
    [warning] = warnings_of(caplog)
    assert "W&B did not start" in warning and "no network" in warning and "\n" not in warning
    assert len(lines_of(tmp_path)) == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(tmp_path, OFFLINE, {}, True, 1) as tracker:
        tracker.log(0, {"train/loss": 1.0})


def test_training_goes_on_when_wandb_raises_in_the_middle_and_a_requeue_makes_it_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker(tmp_path, OFFLINE, {}, True, 5) as tracker:
        tracker.log(0, {"v": 0.0})
        with monkeypatch.context() as patch:
            patch.setattr(type(tracker._wandb._run), "log", lambda *_, **__: 1 / 0)
            for step in (1, 2):
                tracker.log(step, {"v": float(step)})
    [warning] = warnings_of(caplog)
    assert "W&B failed (ZeroDivisionError" in warning and [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2]
    with Tracker(tmp_path, OFFLINE, {}, True, 5, start_step=3) as tracker:
        tracker.log(3, {"v": 3.0})
    records = finished_records(tmp_path, num_runs=2)
    assert [row["step"] for row in history_rows(records)] == [0, 1, 2, 3]


KILLED = """
import sys, time, psutil
from pathlib import Path
from compactlm_nemo.config.run import WandbConfig, WandbMode
from compactlm_nemo.training.tracker import Tracker
with Tracker(Path(sys.argv[1]), WandbConfig(mode=WandbMode.offline), {}, True, 20) as tracker:
    for step in range(20):
        tracker.log(step, {"v": float(step)})
        if step == 5:
            [core] = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
            core.kill()
            core.wait()
        time.sleep(0.02)
with Tracker(Path(sys.argv[1]) / "next", WandbConfig(mode=WandbMode.offline), {}, True, 20) as tracker:
    tracker.log(0, {"v": 7.0})
"""


def test_training_goes_on_when_the_service_of_wandb_is_killed(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=env, capture_output=True, text=True, timeout=60
    )
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(20))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("training goes on without it") == 1, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    [row] = history_rows(finished_records(tmp_path / "next", num_runs=1))  # a training after it in the same process
    assert row["v"] == 7.0
