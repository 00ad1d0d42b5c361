"""`recipes.verify` reads every file of a run, and says which one is not as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compactlm_nemo.config.load import VERIFY, compose_root
from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.workflow.verify import verify
from tests.chaos.damage import copied, files_of, flipped
from tests.support import commands
from tests.support.tiny_run import command


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with finished stages and a training that was stopped on the way."""
    run = tmp_path_factory.mktemp("verify") / "run"
    for recipe in ("import_model", "tokenize", "score", "search", "prune", "distill"):
        result = commands.run(command(inputs, run, "distill.stop_after=4", recipe=recipe))
        assert result.returncode == 0, result.stderr
    return run


def check(run: Path, *overrides: str) -> None:
    verify(compose_root(VERIFY, [f"run.dir={run}", *overrides]))


def test_a_whole_run_is_told_artifact_by_artifact(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(run)
    lines = capsys.readouterr().out.splitlines()
    for part in ("teacher", "tokens", "score", "search", "student", "progress/distill", "checkpoints/step_0000004"):
        assert sum(line.split(":")[0].endswith(part) and line.endswith("files as written") for line in lines) == 1
    check(run, "dry_run=true")
    assert "teacher: would be read" in capsys.readouterr().out


def test_every_file_is_looked_at(run: Path, tmp_path: Path) -> None:
    # settings.json is compared with the settings of the command, metrics.jsonl is read line by line, latest.json names
    # a step: none of them has a hash.
    unsealed = {"settings.json", "metrics.jsonl", "latest.json", "wandb_id"}
    copy = copied(run, tmp_path / "run")
    seen = set()
    for path in files_of(copy):
        if path.name in unsealed or "wandb" in path.parts:
            continue
        before = path.read_bytes()
        if not before:
            continue
        flipped(path)
        with pytest.raises(CheckpointError) as error:
            check(copy)
        if path.name not in ("manifest.json", "hashes.json"):  # what lists the others' hashes may blame one of them
            assert path.name.removeprefix(".").removesuffix(".sha256") in str(error.value)
        path.write_bytes(before)
        seen.add(path.suffix)
    check(copy)
    assert {".distcp", ".bin", ".safetensors", ".json"} <= seen


def test_an_artifact_of_another_teacher_is_told(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path / "run")
    path = copy / "student" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["inputs"]["score"] = "0" * 64
    manifest.pop("digest")  # as a run of an earlier version
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"2 problems(.|\n)*its fingerprint is not(.|\n)*made from another score=0"
    ):
        check(copy)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"run.dir={tmp_path} holds no run"):
        check(tmp_path)
