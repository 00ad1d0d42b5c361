"""Manifests: complete or not there, and which configuration they belong to."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from enum import Enum

import pytest

from compactlm_nemo import artifacts
from compactlm_nemo.config.data import CorpusConfig, DataConfig
from compactlm_nemo.config.score import ScoreConfig
from compactlm_nemo.errors import CheckpointError, ConfigError, NumericsError

SETTINGS = {"score.samples": 1024, "score.lr": 0.1, "score.axes": [1, 2], "run.seed": 7}


def finished(tmp_path, inputs=None):
    folder = artifacts.fresh_folder(tmp_path / "run" / "score")
    (folder / "scores.bin").write_bytes(b"abc")
    artifacts.write_manifest(folder, SETTINGS, inputs or {}, {"loss": 1.5})
    return folder


def test_done_only_with_the_same_settings(tmp_path):
    folder = tmp_path / "run" / "score"
    assert artifacts.stage_is_done(folder, SETTINGS, {}) is False
    artifacts.fresh_folder(folder)
    assert artifacts.stage_is_done(folder, SETTINGS, {}) is False
    finished(tmp_path)
    assert artifacts.stage_is_done(folder, dict(reversed(SETTINGS.items())), {}) is True
    with pytest.raises(ConfigError) as caught:
        artifacts.stage_is_done(folder, SETTINGS | {"score.samples": 512, "new.key": None}, {})
    assert str(caught.value) == (
        f"run.dir={folder.parent} holds score of another configuration "
        f"(differs: new.key=(absent) vs None, score.samples=1024 vs 512); choose another run.dir or delete {folder}."
    )


def test_other_input_is_another_configuration(tmp_path):
    folder = finished(tmp_path, {"teacher": "a" * 64})
    assert artifacts.stage_is_done(folder, SETTINGS, {"teacher": "a" * 64})
    with pytest.raises(ConfigError, match="input teacher=aaaaaaaaaaaa vs bbbbbbbbbbbb"):
        artifacts.stage_is_done(folder, SETTINGS, {"teacher": "b" * 64})


def test_manifest_content(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-value")
    folder = artifacts.fresh_folder(tmp_path / "score")
    (folder / "sub").mkdir()
    (folder / "sub" / "small").write_bytes(b"abc")
    (folder / "large").write_bytes(b"x" * 100)
    artifacts.write_manifest(folder, SETTINGS, {"teacher": "t"}, {"loss": 1.5})
    manifest = artifacts.read_manifest(folder)
    assert manifest["outputs"] == {
        "large": {"bytes": 100, "sha256": hashlib.sha256(b"x" * 100).hexdigest()},
        "sub/small": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
    }
    assert (manifest["seed"], manifest["settings"], manifest["results"]) == (7, SETTINGS, {"loss": 1.5})
    assert manifest["inputs"] == {"teacher": "t"} and manifest["packages"]["torch"]
    assert sorted(path.name for path in folder.iterdir()) == ["large", "manifest.json", "sub"]
    assert "very-secret-value" not in (folder / "manifest.json").read_text()


def test_bad_manifests(tmp_path):
    folder = finished(tmp_path)
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())
    for text in (
        path.read_text()[:-20],
        "[]",
        json.dumps({"settings": {}}),
        json.dumps(whole | {"schema_version": 99}),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="run the stage again"):
            artifacts.stage_is_done(folder, SETTINGS, {})
    path.unlink()
    with pytest.raises(CheckpointError, match="did not finish"):
        artifacts.read_manifest(folder)


def test_fresh_folder_removes_only_its_own_leftovers(tmp_path):
    folder = artifacts.fresh_folder(tmp_path / "run" / "score")
    (folder / "half").touch()
    artifacts.fresh_folder(folder)
    assert not (folder / "half").exists()
    foreign = tmp_path / "report"
    foreign.mkdir()
    artifacts.fresh_folder(foreign)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").touch()
    with pytest.raises(ConfigError, match="holds files and no manifest.json"):
        artifacts.fresh_folder(other)
    assert (other / "chapter").exists()
    done = finished(tmp_path)
    with pytest.raises(ConfigError, match="already holds a finished stage"):
        artifacts.fresh_folder(done)
    assert (done / "scores.bin").exists()


def test_atomic_write_keeps_the_old_text_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    artifacts.atomic_write_text(path, "old")

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        artifacts.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_settings_are_flat_and_equal_after_json():
    class Color(Enum):
        red = "#f00"

    @dataclass
    class Part:
        color: Color = Color.red
        sizes: tuple[int, ...] = (1, 2)
        nested: ScoreConfig = field(default_factory=lambda: ScoreConfig(samples=3))

    data = DataConfig(train={"wiki": CorpusConfig(path="w.jsonl", weight=2.0)})
    flat = artifacts.settings_of({"part": Part(), "data": data, "run.seed": 5})
    assert flat["part.color"] == "red" and flat["part.sizes"] == [1, 2] and flat["part.nested.samples"] == 3
    assert flat["data.train.wiki.weight"] == 2.0 and flat["data.sequence_length"] == 512 and flat["run.seed"] == 5
    assert json.loads(json.dumps(flat)) == flat


def test_a_kill_while_cleaning_leaves_a_folder_that_can_be_cleaned_again(tmp_path, monkeypatch):
    folder = artifacts.fresh_folder(tmp_path / "stage")
    (folder / "part").mkdir()
    (folder / "big").write_text("x")

    def killed(path, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        artifacts.fresh_folder(folder)
    monkeypatch.undo()
    assert [path.name for path in artifacts.fresh_folder(folder).iterdir()] == [".in_progress"]


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(NumericsError, match=r"results.json would hold .* \(0.loss=nan, 1.top.2=inf\); nothing"):
        artifacts.write_json(path, [{"loss": float("nan")}, {"top": [0, 1.0, float("inf")]}])
    assert not path.exists()
    artifacts.write_json(path, {"loss": 1.5})
    assert json.loads(path.read_text()) == {"loss": 1.5}


def test_a_finished_stage_with_a_damaged_output_is_not_skipped(tmp_path):
    folder = finished(tmp_path)
    path = folder / "scores.bin"
    assert artifacts.stage_is_done(folder, SETTINGS, {})
    later = (folder / "manifest.json").stat().st_mtime + 10
    path.write_bytes(b"abd")  # as long as before
    os.utime(path, (later, later))
    with pytest.raises(CheckpointError, match=r"scores.bin is damaged: its SHA-256 is not the recorded .*; delete"):
        artifacts.stage_is_done(folder, SETTINGS, {})
    path.write_bytes(b"abc")
    os.utime(path, (later, later))
    assert artifacts.stage_is_done(folder, SETTINGS, {})
    path.write_bytes(b"ab")
    with pytest.raises(CheckpointError, match=r"scores.bin has 2 bytes, not the recorded 3; delete"):
        artifacts.stage_is_done(folder, SETTINGS, {})
    path.unlink()
    with pytest.raises(CheckpointError, match=r"scores.bin is missing or cannot be read \(No such file"):
        artifacts.stage_is_done(folder, SETTINGS, {})


def test_problems_of_files_are_named_one_by_one(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 5)
    recorded = {path.name: x for path, x in artifacts.describe_files(sorted(tmp_path.iterdir())).items()}
    assert artifacts.file_problems(tmp_path, recorded) == []
    (tmp_path / "b").write_bytes(b"bbbba")
    (tmp_path / "c").unlink()
    (tmp_path / "c").mkdir()
    assert [problem.split(" ")[0].rpartition("/")[2] for problem in artifacts.file_problems(tmp_path, recorded)] == [
        "b", "c",
    ]  # fmt: skip
    assert artifacts.file_problems(tmp_path, recorded, ["a"]) == []
    assert artifacts.file_problems(tmp_path, {"d": {"bytes": 5}, "a": {"bytes": 5}})[0].startswith(f"{tmp_path}/d is")
    for name in ("../outside", "/etc/passwd"):
        (problem,) = artifacts.file_problems(tmp_path, {name: {"bytes": 1}})
        assert "lies outside of its folder" in problem


@pytest.mark.parametrize("dies_at", ["write", "seal", "replace", "never"])
def test_a_sealed_file_is_known_whole_after_a_kill_at_any_instant(tmp_path, monkeypatch, dies_at):
    path = tmp_path / "state.safetensors"

    def put(content):
        with artifacts.sealed(path) as temporary:
            temporary.write_bytes(content)
            if dies_at == "write" and content == b"new":
                raise KeyboardInterrupt

    put(b"old")
    assert artifacts.damaged_seals(tmp_path) == {}
    replace = os.replace

    def die(source, target):
        if dies_at == "seal" or (dies_at == "replace" and str(target) == str(path)):
            raise KeyboardInterrupt
        replace(source, target)

    if dies_at == "never":
        put(b"new")
    else:
        monkeypatch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            put(b"new")
    assert path.read_bytes() == (b"new" if dies_at == "never" else b"old")
    assert artifacts.damaged_seals(tmp_path) == {}
    path.write_bytes(b"odd")
    assert list(artifacts.damaged_seals(tmp_path)) == [path]
    path.unlink()
    assert "is missing" in artifacts.damaged_seals(tmp_path)[path]
    artifacts.remove_sealed(path)
    path.write_bytes(b"from elsewhere")
    assert "has lost its SHA-256" in artifacts.damaged_seals(tmp_path)[path]
