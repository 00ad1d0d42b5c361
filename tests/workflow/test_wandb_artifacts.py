"""What a run makes is at W&B by reference, each version once: the offline files are read by another reader."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from compactlm_nemo.config.load import compose
from compactlm_nemo.config.run import WandbConfig, WandbMode
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.workflow.wandb_artifacts import log_artifacts
from tests.support import commands
from tests.support.tiny_run import command
from tests.support.wandb_files import finished_records

LOGGING = ["wandb.mode=offline", "wandb.name=a/b", "wandb.log_artifacts=true"]


def compress(inputs: Path, run: Path, *overrides: str) -> str:
    result = commands.run(command(inputs, run, *overrides))
    assert result.returncode == 0, result.stderr
    return result.stdout


def artifacts_of(run: Path, processes: int):
    """Every artifact record of the training's W&B run, and the ids of all runs there."""
    records = finished_records(run / "progress" / "distill", num_runs=processes)
    ids = {record.run.run_id for record in records if record.HasField("run")}
    return [record.artifact for record in records if record.HasField("artifact")], ids


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of which nothing is logged, as a kill before the first artifact leaves it."""
    run = tmp_path_factory.mktemp("runs") / "with space"
    compress(inputs, run, "wandb.mode=offline")
    return run


def test_each_artifact_is_logged_once_with_references_hashes_and_losses(inputs: Path, run: Path) -> None:
    told = compress(inputs, run, *LOGGING)
    assert told.count("done before, skipped") == 9
    found, ids = artifacts_of(run, processes=2)
    assert ids == {(run / "progress" / "distill" / "wandb_id").read_text().strip()}
    assert [(artifact.name, artifact.type) for artifact in found] == [
        ("a-b-distill", "model"), ("a-b-export", "model"), ("a-b-report", "report")
    ]  # fmt: skip
    for artifact, name in zip(found, ("distill", "export", "report"), strict=True):
        files = {path.relative_to(run / name).as_posix(): path for path in (run / name).rglob("*") if path.is_file()}
        assert {entry.path for entry in artifact.manifest.contents} == files.keys()
        for entry in artifact.manifest.contents:
            data = files[entry.path].read_bytes()
            assert unquote(urlsplit(entry.ref).path) == str(files[entry.path].resolve()) and entry.ref[:8] == "file:///"
            assert entry.digest == base64.b64encode(hashlib.md5(data).digest()).decode() and entry.size == len(data)
            assert not entry.local_path  # nothing of it would be sent
        metadata, manifest = json.loads(artifact.metadata), json.loads((run / name / "manifest.json").read_text())
        assert (metadata["fingerprint"], metadata["digest"]) == (manifest["fingerprint"], manifest["digest"])
        assert sorted(metadata["sha256"]) == sorted(
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {file}"
            for file, path in files.items()
            if file != "manifest.json"
        )
        trained = json.loads((run / "distill" / "manifest.json").read_text())["results"]["loss"]
        assert metadata["losses"]["validation"] == trained
        if name == "report":
            rows = json.loads((run / "evaluate" / "results.json").read_text())
            assert {row["model"]: {"loss_a": row["loss_a"]} for row in rows}.items() <= metadata["losses"].items()
    compress(inputs, run, *LOGGING)
    assert len(list((run / "progress" / "distill").rglob("*.wandb"))) == 2  # no third part: nothing was lacking

    for name in ("export", "report"):  # made anew, other versions
        shutil.rmtree(run / name)
    compress(inputs, run, *LOGGING, "export.of=student")
    found, _ = artifacts_of(run, processes=3)
    assert [artifact.name.removeprefix("a-b-") for artifact in found] == [
        "distill", "export", "report", "export", "report"
    ]  # fmt: skip
    pruned = json.loads((run / "student" / "manifest.json").read_text())["results"]["loss_after"]
    assert json.loads(found[3].metadata)["losses"] == {"validation": pruned}


def test_what_was_not_sent_is_logged_by_the_next_process(
    inputs: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = copy / "progress" / "distill" / "wandb_artifacts.json"
    record.unlink(missing_ok=True)
    config = compose(command(inputs, copy, *LOGGING)[2:])
    with monkeypatch.context() as patch:
        patch.setattr(wandb.Artifact, "add_reference", lambda *_, **__: 1 / 0)
        log_artifacts(config)
    told = [entry.getMessage() for entry in caplog.records if entry.name.startswith("compactlm")]
    assert [line.partition(" (")[0] for line in told] == ["W&B did not log an artifact"]
    assert not record.exists()
    before = len(artifacts_of(copy, processes=len(list(copy.rglob("*.wandb"))))[0])
    log_artifacts(config)
    assert len(artifacts_of(copy, processes=len(list(copy.rglob("*.wandb"))))[0]) == before + 3
    assert json.loads(record.read_text()).keys() == {"distill", "export", "report"}


def test_a_setting_without_effect_is_refused_or_told(
    inputs: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"wandb\.log_artifacts=true needs W&B"):
        WandbConfig(mode=WandbMode.disabled, log_artifacts=True)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("wandb_artifacts.json"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    log_artifacts(compose(command(inputs, tmp_path / "run", "wandb.log_artifacts=true")[2:]))
    assert "as W&B is off: no login" in caplog.text


def test_candidates_and_rounds_log_none() -> None:
    assert not WandbConfig(log_artifacts=True).part("runs/big", "rank-0", "rank").log_artifacts
