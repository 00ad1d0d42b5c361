"""Versions: setup.py's ranges, the pins and the table agree, and pip keeps NVIDIA's builds."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from compactlm_nemo.config.load import CONF

ROOT = CONF.parent
PINNED = ("torch", "megatron-core", "transformers")
NVIDIA = {
    "torch": "2.9.0a0+50eac811a6.nv25.9",
    "numpy": "1.26.4",
    "transformer_engine": "2.7.0+e9a5fa4",
    "apex": "0.1",
}
"""What the image nvcr.io/nvidia/pytorch:25.09-py3 brings, as far as this package or Megatron-Core cares."""


@dataclass(frozen=True)
class Pins:
    """One combination that the tests ran with: a file of requirements/."""

    file: str
    python: str
    versions: dict[str, str]


def _read_pins(path: Path) -> Pins:
    lines = path.read_text().splitlines()
    versions = dict(line.split("==") for line in lines if not line.startswith("#"))
    return Pins(path.name, lines[0].removeprefix("# Python "), versions)


def _setup_arguments() -> dict[str, Any]:
    call = next(
        node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )  # fmt: skip
    literal = {"python_requires", "install_requires"}
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg in literal}


# The others are environments of other tools.
PINS = [_read_pins(p) for p in sorted((ROOT / "requirements").glob("*.txt")) if p.read_text().startswith("# Python ")]
SETUP = _setup_arguments()
RANGES = {need.name: need.specifier for need in map(Requirement, SETUP["install_requires"]) if need.name in PINNED}


# --- ranges, pins, table -----------------------------------------------------------------------------------------


def test_every_file_of_pins_names_a_python_and_the_three_versions() -> None:
    for pins in PINS:
        assert re.fullmatch(r"3\.\d+", pins.python), pins.file
        assert tuple(pins.versions)[:3] == PINNED, pins.file
        if pins.file.startswith("python"):
            assert pins.file == f"python{pins.python}.txt"


@pytest.mark.parametrize("name", PINNED)
def test_a_range_of_setup_begins_and_ends_where_the_tests_ran(name: str) -> None:
    ran = sorted(Version(pins.versions[name]) for pins in PINS)
    lower = next(Version(bound.version) for bound in RANGES[name] if bound.operator == ">=")
    upper = next(Version(bound.version) for bound in RANGES[name] if bound.operator == "<")
    assert Version(lower.base_version) == ran[0]
    next_release = (ran[-1].major + 1,) if name == "transformers" else (ran[-1].major, ran[-1].minor + 1)
    assert upper.release == next_release


def test_the_pythons_of_setup_are_those_of_the_pins() -> None:
    allowed = SpecifierSet(SETUP["python_requires"])
    minors = [minor for minor in range(30) if allowed.contains(f"3.{minor}")]
    assert [f"3.{minor}" for minor in minors] == sorted({pins.python for pins in PINS})


@pytest.mark.parametrize("build", ["2.8.0a0+34c6371d24.nv25.8", NVIDIA["torch"], "2.10.0a0+b4e4ee81d3.nv25.12"])
def test_the_range_of_torch_holds_the_builds_of_nvidias_images(build: str) -> None:
    assert RANGES["torch"].contains(build, prereleases=True)


def test_the_table_has_one_row_for_each_file_of_pins() -> None:
    rows = {}
    for line in (ROOT / "docs" / "versions.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if link := re.fullmatch(r"\[`.*`\]\(\.\./requirements/(.*)\)", cells[0]):
            rows[link[1]] = cells[1:5]
    assert rows == {pins.file: [pins.python, *(pins.versions[name] for name in PINNED)] for pins in PINS}


def test_continuous_integration_runs_the_second_newest_combination_too() -> None:
    second = sorted(PINS, key=lambda pins: Version(pins.versions["torch"]))[-2]
    assert second.file == f"python{second.python}.txt"
    script = (ROOT / ".ci" / "run").read_text()
    assert f"second=python{second.python}\n" in script
    assert all((ROOT / path).exists() for path in re.findall(r"tests/[\w/.]+", script))


# --- pip beside NVIDIA's builds ----------------------------------------------------------------------------------


def _pip(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where pip is missing or reaches no index."""
    if _pip("--version").returncode:
        pytest.skip("this environment has no pip")
    folder = tmp_path_factory.mktemp("index")
    found = _pip("download", "--no-deps", "--retries=0", "--dest", folder, "packaging", "--no-cache-dir")
    if found.returncode:
        pytest.skip(f"no package index: {found.stderr.strip().splitlines()[-1]}")


def _environment(folder: Path, packages: dict[str, str]) -> Path:
    """Make an environment with the metadata of `packages` and nothing in them; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    for name, number in packages.items():
        info = site / f"{name.replace('-', '_')}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        (info / "RECORD").write_text("")
    return python


def _would_install(report: Path) -> dict[str, str]:
    entries = json.loads(report.read_text())["install"]
    return {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in entries}


@pytest.mark.usefixtures("package_index")
def test_pip_replaces_neither_torch_nor_megatron_of_an_image(tmp_path: Path) -> None:
    others = {need.name: version(need.name) for need in map(Requirement, SETUP["install_requires"])}
    python = _environment(tmp_path / "env", {**others, **NVIDIA, "megatron-core": "0.15.3"})
    report, sources = tmp_path / "report.json", tmp_path / "sources"
    sources.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, sources)
    done = _pip("--python", python, "install", "--dry-run", "--report", report, sources)
    assert done.returncode == 0, done.stderr
    assert _would_install(report).keys() == {"compactlm-nemo"}


@pytest.mark.usefixtures("package_index")
def test_an_environment_beside_nemo_takes_its_own_transformers_and_the_images_torch(tmp_path: Path) -> None:
    """docs/nemo.md: of an image with NeMo 2 only what it has too old is brought anew."""
    tool = {"megatron-core": "0.15.3", "transformers": "4.57.6", "huggingface-hub": "0.36.0", "nemo-toolkit": "2.7.3"}
    others = {need.name: version(need.name) for need in map(Requirement, SETUP["install_requires"])}
    python = _environment(tmp_path / "env", {**others, **NVIDIA, **tool})
    report, sources = tmp_path / "report.json", tmp_path / "sources"
    sources.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, sources)
    done = _pip("--python", python, "install", "--dry-run", "--report", report, sources)
    assert done.returncode == 0, done.stderr
    new = _would_install(report)
    assert Version(new["transformers"]).major == 5 and "compactlm-nemo" in new
    assert not new.keys() & {"torch", "triton", "numpy", "apex", "transformer-engine", "megatron-core"}


# --- the container file ------------------------------------------------------------------------------------------


def _instructions(target: str = "base") -> list[tuple[str, str]]:
    """Return the instructions that the Dockerfile has for a target alone, each with its arguments on one line."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    instructions = [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]
    starts = [i for i, (word, _) in enumerate(instructions) if word == "FROM"]
    targets = {instructions[i][1].split(" AS ")[1]: i for i in starts}
    assert list(targets) == ["base", "nemo2", "compactlm"]  # the last is the default
    if target == "base":
        return instructions[: starts[1]]
    first = targets[target]
    return instructions[first : next((i for i in starts if i > first), None)]


def _arguments(word: str, target: str = "base") -> list[str]:
    return [rest for name, rest in _instructions(target) if name == word]


def test_the_image_can_be_pinned_and_runs_compress_as_a_user() -> None:
    assert _arguments("FROM") == ["${IMAGE}:${TAG}${DIGEST:+@${DIGEST}} AS base"]
    assert _instructions("compactlm") == [("FROM", "base AS compactlm")]
    assert re.fullmatch(r"TAG=\d\d\.\d\d-py3", _arguments("ARG")[1])
    words = [word for word, _ in _instructions()]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert int(_arguments("USER")[0]) > 0
    assert json.loads(_arguments("ENTRYPOINT")[0]) == ["python", "-m", "recipes.compress"]


def test_the_image_gets_dependencies_before_sources_and_only_what_docker_may_read() -> None:
    lines = _instructions()
    install = next(i for i, (word, rest) in enumerate(lines) if word == "RUN" and rest.startswith("pip install"))
    copied = [(i, source) for i, (word, rest) in enumerate(lines) if word == "COPY" for source in rest.split()[:-1]]
    assert {source for i, source in copied if i < install} == {
        "requirements/python3.12.txt", "setup.py", "pyproject.toml",
    }  # fmt: skip
    readable = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
    assert {source.split("/")[0] for _, source in copied} == set(readable)  # a folder is read with what is in it
    assert all((ROOT / source).exists() for _, source in copied)


def test_a_second_target_has_nemo_in_an_environment_of_its_own() -> None:
    assert _arguments("FROM", "nemo2") == ["base AS nemo2"]
    ((source, place),) = [rest.split() for rest in _arguments("COPY", "nemo2")]
    (made,) = _arguments("RUN", "nemo2")
    assert (ROOT / source).is_file() and f"/opt/nemo2/bin/pip install --no-cache-dir --requirement {place}" in made
    assert [word for word, _ in _instructions("nemo2")][-1] == "USER" and int(_arguments("USER", "nemo2")[-1]) > 0


def _shim(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def _run_pip_lines(folder: Path, packages: dict[str, str]) -> dict[str, str]:
    """Run the Dockerfile's lines that call pip, without installing, where `packages` are; return what pip would add.

    `COPY` and `ENV` are followed; `python` does nothing, since what it imports is in the real image alone.
    """
    python = _environment(folder / "env", packages)
    work, shims = folder / "work", folder / "shims"
    work.mkdir(), shims.mkdir()
    _shim(shims / "python", "exit 0")
    _shim(
        shims / "pip",
        f'pip=({sys.executable} -m pip --python {python})\n[[ $1 == install ]] || exec "${{pip[@]}}" "$@"\n'
        f'exec "${{pip[@]}}" install --dry-run --report {folder}/$RANDOM$RANDOM.json "${{@:2}}"',
    )
    strict = folder / "constraint.txt"  # as NVIDIA's: all that the image was made with, too old for this package
    strict.write_text("transformers==4.57.6\npackaging==23.2\n")
    env = {**os.environ, "PATH": f"{shims}:{os.environ['PATH']}", "PIP_CONSTRAINT": str(strict)}
    inside = _arguments("WORKDIR")[0]
    for word, rest in _instructions():
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = work / target / Path(source).name if target == "./" else work / target
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, place)
        elif word == "ENV":
            name, _, value = rest.partition("=")
            env[name] = value.replace(inside, str(work))
        elif word == "RUN" and re.search(r"\bpip\b", rest):
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", rest], cwd=work, env=env, capture_output=True, text=True, timeout=400
            )
            assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"
    new: dict[str, str] = {}
    for report in folder.glob("*.json"):
        new |= _would_install(report)
    return new


@pytest.mark.usefixtures("package_index")
@pytest.mark.slow
def test_the_lines_of_the_dockerfile_add_to_an_image_that_has_megatron(tmp_path: Path) -> None:
    new = _run_pip_lines(tmp_path, {**NVIDIA, "megatron-core": "0.15.3"})
    assert not new.keys() & {"torch", "triton", "numpy", "apex", "transformer-engine", "megatron-core"}
    assert new["transformers"] == _read_pins(ROOT / "requirements" / "python3.12.txt").versions["transformers"]
    assert "compactlm-nemo" in new


@pytest.mark.usefixtures("package_index")
@pytest.mark.skipif(sys.version_info < (3, 12), reason="the image has Python 3.12, and its Megatron-Core asks for it")
def test_the_lines_of_the_dockerfile_add_megatron_to_an_image_without(tmp_path: Path) -> None:
    new = _run_pip_lines(tmp_path, NVIDIA)
    assert not new.keys() & {"torch", "triton", "numpy", "apex", "transformer-engine"}
    assert new["megatron-core"] == _read_pins(ROOT / "requirements" / "python3.12.txt").versions["megatron-core"]
