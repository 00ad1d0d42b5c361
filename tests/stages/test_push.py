"""A push to the Hub: refused without a token, whole or not at all, and only of files that are as they were written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compactlm_nemo.artifacts import read_manifest
from tests.support import commands
from tests.support.hub import TOKEN, Hub, hub
from tests.support.tiny_run import command

ROOT = Path(__file__).parents[2]
PUSH = ("export.of=teacher", "export.push=org/name")


@pytest.fixture(scope="module")
def exported(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    for recipe in ("import_model", "export"):
        done = commands.run(command(inputs, run, "export.of=teacher", recipe=recipe))
        assert done.returncode == 0, done.stderr
    return run


def _push(
    inputs: Path, run: Path, server: Hub | None, *overrides: str, token: str | None = TOKEN, **more: str
) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(run / "no_login"), "HF_ENDPOINT": server.url if server else "http://127.0.0.1:9", **more}
    env |= {"HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})
    plain = ["-c", "import sys, runpy; sys.argv[0] = 'push'; runpy.run_module('recipes.push', run_name='__main__')"]
    words = command(inputs, run, *PUSH, *overrides)[2:]  # a process of its own: the endpoint is read at import

    return subprocess.run(
        [sys.executable, *plain, *words], env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("setting", "env", "line"),
    [
        ([], {"token": None}, "export.push=org/name needs a token that may write there; set HF_TOKEN"),
        ([], {"HF_HUB_OFFLINE": "1"}, "needs the Hub, and HF_HUB_OFFLINE is set"),
        (["export.push=name"], {}, "export.push=name must be ORG/NAME"),
        (["export.push='a/../b'"], {}, "must be ORG/NAME"),
        ([], {"token": "hf_other"}, "was refused by http://127.0.0.1"),
    ],
)
def test_a_push_that_cannot_be_is_one_line(
    inputs: Path, exported: Path, tmp_path: Path, setting: list[str], env: dict, line: str
) -> None:
    shutil.copytree(exported, tmp_path / "run")
    with hub() as server:
        done = _push(inputs, tmp_path / "run", server, *setting, **env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and line in done.stderr, done.stderr
    assert server.files == {} and not (tmp_path / "run" / "push" / "manifest.json").exists()


def test_a_dry_run_says_what_it_would_push(inputs: Path, exported: Path) -> None:
    with hub() as server:
        done = _push(inputs, exported, server, "dry_run=true")
    assert done.returncode == 0, done.stderr
    sizes = [described["bytes"] for described in read_manifest(exported / "export")["outputs"].values()]
    assert (
        f"push: would upload {len(sizes)} files, {sum(sizes):,} bytes, to org/name: README.md, card.json, config.json"
        in done.stdout
    )
    assert server.created == [] and server.files == {}


@pytest.mark.proves("stages", ["export", "push"], "Hugging Face folder", "written")
def test_a_push_is_one_commit_of_the_verified_files_and_goes_on_after_a_failure(
    inputs: Path, exported: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported, run)
    (run / "export" / "hf" / "stray.txt").write_text("put here later")
    with hub() as server:
        server.files["model-00001-of-00002.safetensors"] = b"of an earlier push"
        server.files["theirs.md"] = b"of the user"
        server.fail_commits = 1
        done = _push(inputs, run, server)
        *bars, line = done.stderr.splitlines()
        assert done.returncode == 75 and line.startswith("error: push: ") and "this may pass" in line, done.stderr
        assert all("model.safetensors: " in bar or not bar for bar in bars)
        assert len(server.uploads) == 1 and server.commits == []
        done = _push(inputs, run, server)
        assert done.returncode == 0, done.stderr
        assert len(server.uploads) == 1, "weights that the Hub has are not sent again"
        names = {name.removeprefix("hf/") for name in read_manifest(run / "export")["outputs"]}
        assert server.files.keys() == names | {"theirs.md"} and "stray.txt" not in names
        for name in names:
            assert server.files[name] == (run / "export" / "hf" / name).read_bytes()
        made = server.created[0]
        assert made.get("visibility") == "private" or made.get("private") is True  # by the version of the library
        assert len(server.commits) == 1
        assert read_manifest(run / "push")["results"]["commit"] == server.commits[0]
        assert "done before, skipped" in _push(inputs, run, server).stdout and len(server.commits) == 1


def test_a_damaged_folder_is_not_pushed(inputs: Path, exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported, run)
    path = run / "export" / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")  # a norm of 1.0 ends with 0x3f
    with hub() as server:
        done = _push(inputs, run, server)
    assert done.returncode == 2 and "its SHA-256 is not the recorded one" in done.stderr
    assert server.files == {} and server.created == []


def test_no_way_to_the_hub_may_pass(inputs: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "run")
    done = _push(inputs, tmp_path / "run", None)
    assert done.returncode == 75 and "http://127.0.0.1:9: Network is unreachable; this may pass" in done.stderr
