"""The gate at the end of a run: its verdict on the page, its exit code, and what does not leave when it fails."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest

from compactlm_nemo.artifacts import MANIFEST, read_manifest, write_manifest
from tests.report.test_speed import PROFILE, ROWS
from tests.support import commands
from tests.support.tiny_run import command

SECRETS = {"HF_TOKEN": "hf_canary", "WANDB_API_KEY": "canary" * 7, "AWS_SECRET_ACCESS_KEY": "aws_canary"}
LOSS = "gate.limits.loss={{metric: loss/*, compare: against_teacher, at_most: {}}}"
SIZE = "gate.limits.size={metric: params, compare: ratio, at_most: 0.9}"


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that the gate lets pass, made where secrets stand in the environment."""
    run = tmp_path_factory.mktemp("runs") / "run"
    env = {**os.environ, **SECRETS, "WANDB_MODE": "disabled"}
    done = commands.run(command(inputs, run, LOSS.format(9), SIZE), env=env)
    assert done.returncode == 0, done.stderr
    assert "gate: PASS, 2 of 2 limits hold" in done.stdout
    return run


def _again(inputs: Path, run: Path, tmp_path: Path, *words: str, lost: tuple[str, ...] = ("report",)) -> Any:
    """Go on with a copy of the run that has lost some artifacts."""
    shutil.copytree(run, tmp_path / "run")
    for artifact in lost:
        shutil.rmtree(tmp_path / "run" / artifact)
    return commands.run(command(inputs, tmp_path / "run", *words), env={**os.environ, "COLUMNS": "200"})


def test_the_page_and_the_card_have_the_verdict(run: Path) -> None:
    page = (run / "report" / "report.md").read_text()
    assert page.rstrip().endswith("**PASS**: all limits are kept") and "## Gate" in page
    assert "\nGate: **PASS**" in page
    rows = {row["model"]: row for row in json.loads((run / "evaluate" / "results.json").read_text())}
    metrics = json.loads((run / "evaluate" / "quality.json").read_text())["metrics"]
    rise = next(each for each in metrics if each["metric"] == "loss/a")["against_teacher"]["distilled"]
    assert rise["value"] == pytest.approx(rows["distilled"]["loss_a"] - rows["teacher"]["loss_a"], abs=1e-6)
    ends = f"{rise['low']:.4g} to {rise['high']:.4g}"
    assert f"| loss | loss/a, distilled - teacher's | {rise['value']:.4g} | {ends} | at most 9 | PASS |" in page
    gate = json.loads((run / "report" / "card.json").read_text())["gate"]
    assert gate["passed"] and [each["limit"] for each in gate["limits"]] == ["loss", "size"]
    assert gate["limits"][1]["value"] == rows["distilled"]["params"] / rows["teacher"]["params"]


def test_a_run_that_fails_keeps_its_artifacts_and_ends_with_3(inputs: Path, run: Path, tmp_path: Path) -> None:
    done = _again(inputs, run, tmp_path, LOSS.format(-9), SIZE)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("gate: FAIL, 1 of 2 limits do not hold") and done.stderr.count("\n") == 1
    assert "loss/a, distilled - teacher's" in done.stderr and "at most -9" in done.stderr
    page = (tmp_path / "run" / "report" / "report.md").read_text()
    assert page.rstrip().endswith("**FAIL**: 1 of 2 limits are not kept") and "\nGate: **FAIL**: 1 of 2" in page
    assert all((tmp_path / "run" / name / MANIFEST).is_file() for name in ("distill", "evaluate", "export", "report"))
    again = commands.run(command(inputs, tmp_path / "run", LOSS.format(-9), SIZE))
    assert again.returncode == 3 and again.stdout.count("done before, skipped") == 9


def test_a_run_with_engines_has_its_profile_in_the_report_and_under_the_gate(
    inputs: Path, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "report")
    (tmp_path / "run" / "profile").mkdir()
    (tmp_path / "run" / "profile" / "profile.json").write_text(json.dumps(PROFILE))
    write_manifest(tmp_path / "run" / "profile", {}, {}, {})
    limit = "gate.limits.speed={metric: speed/transformers/8, compare: ratio, at_least: 1.5}"
    words = command(inputs, tmp_path / "run", "profile.engines=[transformers]", limit, recipe="report")
    done = commands.run(words)
    assert done.returncode == 0 and "gate: PASS, 1 of 1 limits hold" in done.stdout, done.stderr
    page = (tmp_path / "run" / "report" / "report.md").read_text()
    assert all(row in page for row in ROWS) and "## Cost so far" in page
    html = (tmp_path / "run" / "report" / "report.html").read_text()
    assert all(f">{cell}<" in html for row in ROWS for cell in row.strip("| ").split(" | "))


def test_two_ranks_say_it_once(inputs: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "report")
    done = commands.run(command(inputs, tmp_path / "run", LOSS.format(-9), SIZE), ranks=2)
    assert done.returncode == 3 and done.stderr.count("gate: FAIL") == 1, done.stderr


def test_what_fails_is_not_pushed(inputs: Path, run: Path, tmp_path: Path) -> None:
    """The Hub is at an address where nobody answers: a push that began would end with 75."""
    shutil.copytree(run, tmp_path / "run")
    for artifact in ("report", "export"):
        shutil.rmtree(tmp_path / "run" / artifact)
    env = {**os.environ, "HF_TOKEN": "hf_x", "HF_ENDPOINT": "http://127.0.0.1:9"}
    words = command(inputs, tmp_path / "run", "export.push=org/name", LOSS.format(-9))
    done = commands.run(words, env=env)
    assert done.returncode == 3, done.stderr
    assert "push: left out, as the gate says FAIL" in done.stdout
    assert not (tmp_path / "run" / "push").exists() and (tmp_path / "run" / "report" / "report.md").is_file()
    done = commands.run(
        command(inputs, tmp_path / "run", "export.push=org/name", LOSS.format(-9), recipe="push"), env=env
    )
    assert done.returncode == 3 and "left out" in done.stdout
    done = commands.run(
        command(inputs, tmp_path / "run", "export.push=org/name", LOSS.format(9), recipe="push"), env=env
    )
    assert done.returncode == 75, done.stderr


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "gate.limits.loss={metric: loss/b, at_most: 1}",
            "loss/b is not among what a run measures; did you mean loss/a",
        ),
        ("gate.limits.loss={metric: los/a, at_most: 1}", "did you mean loss/a"),
        ("gate.limits.loss={metric: loss/a}", "must name a metric and at_most or at_least"),
        ("gate=nothing", "Available options in 'gate'"),
    ],
)
def test_a_limit_on_what_no_run_measures_ends_it_before_it_starts(
    inputs: Path, tmp_path: Path, word: str, line: str
) -> None:
    done = commands.run(command(inputs, tmp_path / "run", word))
    assert done.returncode == 2 and line in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_gate_of_another_model_than_is_pushed_is_refused(inputs: Path, tmp_path: Path) -> None:
    env = {**os.environ, "HF_TOKEN": "hf_x"}
    words = ["export.push=org/name", "export.of=student", "gate=default"]
    done = commands.run(command(inputs, tmp_path / "run", *words), env=env)
    assert done.returncode == 2 and "no limit of the gate is of that model; give one model: pruned" in done.stderr


def test_a_dry_run_names_the_limits(inputs: Path, tmp_path: Path) -> None:
    done = commands.run(command(inputs, tmp_path / "run", "gate=default", "dry_run=true"))
    assert done.returncode == 0, done.stderr
    assert "gate: loss: loss/*, distilled - teacher's must be at most 0.5" in done.stdout


def test_the_exported_card_holds_what_decided_the_student(run: Path) -> None:
    card = json.loads((run / "export" / "hf" / "card.json").read_text())
    assert (card["model"], card["teacher"], card["dtype"], card["seeds"]) == ("distill", "teacher", "float32", [1234])
    assert card["tokens_trained"] == 6 * 4 * 16
    assert [card["shape"][name]["layers"] for name in ("teacher", "student")] == [4, 2]
    assert [card["shape"][name]["params"] for name in ("teacher", "student")] == [40128, 10032]
    assert card["made_with"]["python"] == platform.python_version() and card["made_with"]["packages"]["torch"]
    assert list(card["stages"]) == ["teacher", "tokens", "score", "search", "student", "distill"]
    for name, stage in card["stages"].items():
        manifest = json.loads((run / name / "manifest.json").read_text())
        assert (stage["fingerprint"], stage["inputs"]) == (manifest["fingerprint"], manifest["inputs"])
        for file, digest in stage["sha256"].items():
            assert hashlib.sha256((run / name / file).read_bytes()).hexdigest() == digest
    assert card["stages"]["distill"]["settings"]["distill.steps"] == 6
    assert card["stages"]["tokens"]["inputs"].keys() >= {"data.train.a", "data.heldout.a"}
    rows = {row["model"]: row for row in json.loads((run / "evaluate" / "results.json").read_text())}
    assert card["measured"]["loss/a"]["models"]["distilled"]["value"] == rows["distilled"]["loss_a"]


def test_the_cards_hold_no_secret_and_nobodys_folders(inputs: Path, run: Path) -> None:
    for path in (run / "export" / "hf" / "card.json", run / "report" / "card.json"):
        text = path.read_text()
        assert "canary" not in text and str(run) not in text and str(inputs) not in text
        assert str(Path.home()) + "/" not in text
    assert '"train.jsonl"' in (run / "report" / "card.json").read_text()


def test_the_hashes_of_the_export_stay_true(run: Path) -> None:
    """The report's card is a file of its own: what has left is never written again."""
    manifest = read_manifest(run / "export")
    assert "hf/card.json" in manifest["outputs"]
    for name, told in manifest["outputs"].items():
        assert hashlib.sha256((run / "export" / name).read_bytes()).hexdigest() == told["sha256"]
    card = json.loads((run / "report" / "card.json").read_text())
    assert card["stages"]["export"]["sha256"]["hf/card.json"] == manifest["outputs"]["hf/card.json"]["sha256"]
    assert card["stages"]["export"]["digest"] == manifest["digest"] and "evaluate" in card["stages"]


def test_a_card_of_a_teacher_does_not_travel(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "card.json").write_text('{"of": "another"}')
    for recipe in ("import_model", "export"):
        words = (f"model.source={tmp_path}/teacher", "export.of=teacher", "export.format=hf")
        done = commands.run(command(inputs, tmp_path / "run", *words, recipe=recipe))
        assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "run" / "export" / "hf" / "card.json").read_text())
    assert (card["model"], list(card["stages"]), card["measured"]) == ("teacher", ["teacher"], {})
    assert not (tmp_path / "run" / "teacher" / "hf" / "card.json").exists()
