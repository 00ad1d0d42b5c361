"""A teacher that is a repository of the Hub: its commit, what is fetched of it and what is not, and every refusal."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compactlm_nemo.artifacts import read_manifest
from compactlm_nemo.models.hf_assets import INDEX
from tests.support.hub import TOKEN, Hub, hub
from tests.support.tiny_run import command

ROOT = Path(__file__).parents[2]
PICKLE = {"pytorch_model.bin": b"pickled", "modeling_own.py": b"raise SystemExit", "original/weights.safetensors": b"0"}


@pytest.fixture(scope="module")
def files(inputs: Path) -> dict[str, bytes]:
    """The files of the tiny teacher, and what nobody asks for."""
    return {path.name: path.read_bytes() for path in (inputs / "teacher").iterdir()} | PICKLE


def sharded(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The same weights in two files with an index, and a second copy under another name."""
    folder.mkdir()
    (folder / "whole.safetensors").write_bytes(files["model.safetensors"])
    tensors = load_file(folder / "whole.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "whole.safetensors").rename(folder / "consolidated.safetensors")
    rest = {name: content for name, content in files.items() if name != "model.safetensors"}
    return rest | {path.name: path.read_bytes() for path in folder.iterdir()}


def run_recipe(
    inputs: Path,
    folder: Path,
    server: Hub | None,
    *overrides: str,
    ranks: int = 1,
    recipe: str = "import_model",
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run a recipe in `folder / "run"` with a cache in `folder / "cache"`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    kept |= {"HF_HOME": str(folder / "cache"), "HF_ENDPOINT": server.url if server else "http://127.0.0.1:9"}
    words = command(inputs, folder / "run", "model.source=org/name", *overrides, recipe=recipe)
    if ranks > 1:
        words = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", *words]
    return subprocess.run(
        [sys.executable, *words], env=kept | {"HF_HUB_DISABLE_XET": "1"} | env, cwd=ROOT, capture_output=True, text=True
    )


def imported(folder: Path) -> dict[str, str]:
    """The hashes of what an import wrote."""
    outputs = read_manifest(folder / "run" / "teacher")["outputs"]
    return {name: described["sha256"] for name, described in outputs.items() if name.endswith((".distcp", ".json"))}


@pytest.mark.proves("stages", "import_model", ["Hugging Face folder", "repository of the Hub"], "read")
def test_a_repository_is_the_teacher_that_its_folder_is(inputs: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    one, two, plain = tmp_path / "one", tmp_path / "two", tmp_path / "plain"
    with hub() as server:
        commit = server.publish(files)
        done = run_recipe(inputs, one, server)
        assert done.returncode == 0, done.stderr
        assert f"org/name at {commit}: " in done.stdout and "MB fetched" in done.stdout
        assert not {name for name in server.downloads if name in PICKLE}, server.downloads
        settings = read_manifest(one / "run" / "teacher")["settings"]
        assert settings["model.source"] == "org/name" and settings["model.revision"] == commit
        server.downloads.clear()
        parts = server.publish(sharded(files, tmp_path / "parts"), branch="parts")
        done = run_recipe(inputs, two, server, "model.revision=parts")
        assert done.returncode == 0, done.stderr
        assert read_manifest(two / "run" / "teacher")["settings"]["model.revision"] == parts
        assert "consolidated.safetensors" not in server.downloads
    done = run_recipe(inputs, plain, None, f"model.source={inputs}/teacher")
    assert done.returncode == 0, done.stderr
    assert imported(one) == imported(two) == imported(plain) != {}


@pytest.mark.slow
def test_a_run_keeps_the_commit_that_it_began_with(inputs: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    with hub() as server:
        first = server.publish(files)
        plan = run_recipe(inputs, tmp_path, server, "dry_run=true")
        assert plan.returncode == 0 and f"revision: {first}" in plan.stdout, plan.stderr
        assert server.downloads == ["config.json"] and not (tmp_path / "run").exists()
        done = run_recipe(inputs, tmp_path, server)
        assert done.returncode == 0, done.stderr
        other = server.publish(files | {"LICENSE": b"of later"})
        asked = server.requests
        assert "done before, skipped" in run_recipe(inputs, tmp_path, server).stdout
        assert server.requests == asked, "a commit in the cache needs no network"
        assert "done before, skipped" in run_recipe(inputs, tmp_path, None, HF_HUB_OFFLINE="1").stdout
        refused = run_recipe(inputs, tmp_path, server, f"model.revision={other}")
        assert refused.returncode == 2 and f"model.revision={first}"[:20] in refused.stderr, refused.stderr
        # The cache does for another run without a network; there the branch is what it was when last asked.
        apart = run_recipe(inputs, tmp_path, None, f"run.dir={tmp_path}/apart", "model.revision=" + first)
        assert apart.returncode == 0, apart.stderr
    assert json.loads((tmp_path / "run" / "hub.json").read_text())["commit"] == first


def test_every_rank_has_the_main_ranks_commit(inputs: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    with hub() as server:
        commit = server.publish(files)
        done = run_recipe(inputs, tmp_path, server, "parallel.tp=2", ranks=2)
        assert done.returncode == 0, done.stderr
        assert sorted(server.downloads) == sorted(set(server.downloads)), "one rank fetches"
    assert read_manifest(tmp_path / "run" / "teacher")["settings"]["model.revision"] == commit


GATED, PRIVATE, BUSY = (403, "GatedRepo"), (401, "RepoNotFound"), (503, "Busy")


@pytest.mark.parametrize(
    ("refusal", "setting", "code", "line"),
    [
        (GATED, [], 2, "model.source=org/name is gated; ask for access at http://127.0.0.1"),
        (PRIVATE, [], 2, "model.source=org/name is no folder here, and no repository of http://127.0.0.1"),
        (BUSY, [], 75, "Resource temporarily unavailable; this may pass"),
        (None, ["model.revision=nowhere"], 2, "model.revision=nowhere is no branch, tag or commit of org/name; look"),
        (None, ["model.source=org/a--b"], 2, "model.source=org/a--b is no folder here, and no repository of"),
        (None, ["model.revision=bare"], 2, "model.source=org/name has no config.json at bare; give a repository"),
        (None, ["model.source=absent", "model.revision=main"], 2, "which model.source=absent is not; leave it out"),
        (
            None,
            ["model.revision=pickled"],
            2,
            "org/name has no *.safetensors file beside pytorch_model.bin; pickled",
        ),
        (None, ["model.revision=holes"], 2, "model.source=org/name lacks 1 of 2 shards, first model-00002-of-00002"),
        (None, ["model.revision=huge"], 75, "GB to fetch, "),
    ],
)
def test_a_repository_that_cannot_be_is_one_line(
    inputs: Path,
    files: dict[str, bytes],
    tmp_path: Path,
    refusal: tuple[int, str] | None,
    setting: list[str],
    code: int,
    line: str,
) -> None:
    parts = sharded(files, tmp_path / "parts")
    with hub() as server:
        server.publish(files)
        server.publish({"README.md": b"nothing"}, "bare")
        server.publish({name: each for name, each in files.items() if name != "model.safetensors"}, "pickled")
        server.publish({name: each for name, each in parts.items() if "00002-of" not in name}, "holes")
        server.publish(files | {"model.safetensors": Huge(2**50)}, "huge")
        server.refusal = refusal
        done = run_recipe(inputs, tmp_path, server, *setting)
        lines = [each for each in done.stderr.splitlines() if each.startswith("error:")]
        assert done.returncode == code and len(lines) == 1 and line in lines[0], done.stderr
        assert "Traceback" not in done.stderr and "model.safetensors" not in server.downloads
        assert not (tmp_path / "run" / "teacher" / "manifest.json").exists()


class Huge(bytes):
    """A file that is not sent, of a size that no disk has."""

    def __new__(cls, size: int) -> Huge:
        made = super().__new__(cls, b"huge")
        made.size = size
        return made

    def __len__(self) -> int:
        return self.size


def test_a_token_opens_what_is_gated_for_the_command_of_the_page(
    inputs: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    [block] = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.S)
    settings = [word for word in shlex.split(block) if word.startswith("model.")]
    with hub() as server:
        server.publish(files)
        server.refusal = GATED
        done = run_recipe(inputs, tmp_path, server, "dry_run=true", *settings, HF_TOKEN=TOKEN)
        assert done.returncode == 0 and "source: meta-llama/Llama-3.1-8B" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("env", "code", "line"),
    [
        ({"HF_HUB_OFFLINE": "1"}, 2, "and HF_HUB_OFFLINE is set; unset it, or fetch it where there is a network."),
        ({}, 75, "is asked for it: Network is unreachable; this may pass"),
    ],
)
def test_no_way_to_the_hub_is_one_line(inputs: Path, tmp_path: Path, env: dict[str, str], code: int, line: str) -> None:
    done = run_recipe(inputs, tmp_path, None, **env)
    assert done.returncode == code and done.stderr.count("\n") == 1 and line in done.stderr, done.stderr


def test_a_plan_of_a_known_architecture_does_without_the_hub(inputs: Path, tmp_path: Path) -> None:
    settings = ["dry_run=true", "model.architecture.model_type=llama", "search.hidden=[2048]", "search.heads=[32]"]
    done = run_recipe(inputs, tmp_path, None, *settings, "search.ffn=[1024]", "search.layers=[2]")
    assert done.returncode == 0, done.stderr
    assert "planned with model.architecture: " in done.stderr and "Network is unreachable" in done.stderr
