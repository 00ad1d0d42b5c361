"""bench.gpu ends in time whatever its parts do, loses no figure, and all of it runs at toy size."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import __main__ as bench
from bench.gpu.record import Record
from bench.gpu.runner import run_part
from bench.gpu.table import markdown
from tests.support import commands
from tests.support.bad_parts import is_running

BEFORE = {"name": "before", "value": 1.0, "unit": "", "goal": "", "met": None}


def _run(*options: str, out: Path) -> tuple[dict[str, Any], str]:
    done = commands.run(["-m", "bench.gpu", "--dry", "--out", str(out), *options])
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    return json.loads(out.read_text()), done.stdout


def test_a_dry_run_measures_every_part(tmp_path: Path) -> None:
    parts = [part for part in bench.PARTS if part != "checks"]
    result, table = _run("--minutes", "40", "--parts", ",".join(parts), out=tmp_path / "gpu.json")
    assert list(result["parts"]) == parts
    for part, found in result["parts"].items():
        assert found["state"] == "done" and found["figures"] and found["error"] is None, part
        assert all(f"| {part} | {row['name']} |" in table for row in found["figures"])
        assert all("liger" in error for error in found["details"].get("errors", {}).values()), part
    assert result["machine"]["versions"]["torch"] and result["machine"]["card"] in table.splitlines()[0]
    assert result["run"]["dry"]


@pytest.mark.slow
def test_a_dry_run_passes_the_tests_for_a_gpu(tmp_path: Path) -> None:
    result, table = _run("--minutes", "40", "--parts", "checks", out=tmp_path / "gpu.json")
    found = result["parts"]["checks"]
    assert found["state"] == "done" and set(found["details"]["tests"].values()) == {"PASSED"}
    assert f"{len(found['details']['tests'])} of {len(found['details']['tests'])}" in table


@pytest.mark.parametrize(("part", "error"), [("fails", "ValueError: no"), ("dies", "ended with exit code 7")])
def test_a_part_that_fails_is_recorded_in_one_line_with_what_it_had(part: str, error: str) -> None:
    found = run_part(f"tests.support.bad_parts:{part}", 60.0, dry=True)
    assert (found["state"], found["error"], found["figures"]) == ("failed", error, [BEFORE])


def test_a_part_that_hangs_is_killed_with_its_children() -> None:
    start = time.monotonic()
    found = run_part("tests.support.bad_parts:hangs", 15.0, dry=True)
    assert time.monotonic() - start < 25
    assert (found["state"], found["error"]) == ("stopped", "stopped after 15 s")
    assert found["figures"] == [BEFORE]
    assert not is_running(found["details"]["child"])


def test_the_others_go_on_and_the_result_is_whole_after_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states: list[list[str]] = []

    def run_one(part: str, seconds: float, *, dry: bool) -> dict[str, Any]:
        if out.is_file():
            states.append([found["state"] for found in json.loads(out.read_text())["parts"].values()])
        if part == "bench.gpu.checks":
            raise OSError("no process")
        return {"state": "done", "seconds": 1.0, "error": None, "figures": [BEFORE], "details": {"card": "a card"}}

    out = tmp_path / "gpu.json"
    monkeypatch.setattr(bench, "run_part", run_one)
    assert bench.run(["environment", "checks", "head"], 60.0, out, dry=True) == 1
    assert states == [["done", "left out", "left out"], ["done", "failed", "left out"]]
    assert "- checks failed: OSError: no process" in capsys.readouterr().out


def test_the_whole_run_ends_in_time_even_where_a_part_cannot_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "run_part", lambda part, seconds, dry: time.sleep(60))
    monkeypatch.setattr(bench, "RESERVE_SECONDS", 0.0)
    start = time.monotonic()
    assert bench.run(["head"], 3.0, tmp_path / "gpu.json", dry=True) == 1
    assert time.monotonic() - start < 10
    assert "- head left out: no time left" in capsys.readouterr().out


def test_figures_are_held_to_their_goals(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json", 60.0)
    record.figure("speed", 612.0, "TFLOP/s", at_least=600)
    record.figure("ratio", 1.06, at_most=1.05)
    found = json.loads((tmp_path / "record.json").read_text()) | {"error": None, "state": "done"}
    result = {
        "run": {"dry": False, "seconds": 9.0},
        "machine": {"card": "a card", "versions": {"torch": "2.11"}},
        "parts": {"head": found},
    }
    table = markdown(result)
    assert "| head | speed | 612 TFLOP/s | >= 600 | met |" in table
    assert "| head | ratio | 1.06 | <= 1.05 | **missed** |" in table
    assert table.endswith("a card: speed 612 TFLOP/s; ratio 1.06; 1 of 2 goals; 9 s")
