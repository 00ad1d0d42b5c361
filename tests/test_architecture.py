"""The rules of the code's layout, read from the imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF

ROOT = CONF.parent
CODE = ROOT / "compactlm_nemo"
PACKAGE = sorted(CODE.rglob("*.py"))
LONGEST_LINES = 400

ORDER = [
    "errors", "config", "artifacts", "parallel", "progress", "data", "losses", "models", "importance", "evaluation",
    "training", "search", "pruning", "distill", "planning", "report", "stages", "workflow",
]  # fmt: skip
"""The rooms of the package, folders and the modules at its root; each imports only what stands above it here."""
MOST_ARROWS, MOST_FLOORS = 100, 10

# Library (or part of one) -> the only files that may import it.
ONLY_USERS = {
    "hydra": {"config/application.py", "config/load.py", "config/overrides.py"},
    "omegaconf": {
        "config/application.py",
        "config/load.py",
        "config/evaluate.py",
        "config/model.py",
        "config/run.py",
        "workflow/sweep.py",
    },
    "megatron.core.parallel_state": {"parallel/mesh.py", "parallel/launch.py", "planning/fake_world.py"},
    "pickle": {"models/checkpoint.py", "models/checkpoint_metadata.py"},  # the first for the name of an error
    "wandb": {"training/wandb_run.py"},
    "wandb_workspaces": {"workflow/dashboard.py"},
}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(path: Path) -> str:
    return path.relative_to(CODE).with_suffix("").parts[0]


@cache
def _arrows() -> dict[str, set[str]]:
    """Room -> the other rooms that it imports."""
    arrows: dict[str, set[str]] = {room: set() for room in ORDER}
    for path in PACKAGE:
        for name in _imports(path):
            if name.startswith("compactlm_nemo.") and _room(path) in arrows:
                arrows[_room(path)].add(name.split(".")[1])
    return {room: used - {room} for room, used in arrows.items()}


def test_every_room_has_its_place() -> None:
    rooms = {path.stem if path.is_file() else path.name for path in CODE.iterdir() if path.suffix in ("", ".py")}
    assert rooms - {"__init__", "__pycache__"} == set(ORDER)
    assert {path.stem for path in CODE.glob("*.py")} == {"__init__", "errors", "artifacts", "progress"}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_upwards(path: Path) -> None:
    if _room(path) == "__init__":
        return
    for name in _imports(path):
        if name.startswith("compactlm_nemo."):
            assert ORDER.index(name.split(".")[1]) <= ORDER.index(_room(path)), f"{path} imports {name}"


def test_the_house_is_low_and_its_rooms_know_few_others() -> None:
    floors: dict[str, int] = {}
    for room in TopologicalSorter(_arrows()).static_order():  # raises where there is a circle
        floors[room] = 1 + max((floors[used] for used in _arrows()[room]), default=0)
    assert max(floors.values()) <= MOST_FLOORS, floors
    assert sum(map(len, _arrows().values())) <= MOST_ARROWS


def test_modules_import_each_other_in_no_circle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE}
    graph = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        at_import = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
        named = {node.module for node in at_import} | {f"{n.module}.{a.name}" for n in at_import for a in n.names}
        graph[name] = {used for used in named if used in modules}
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("library", sorted(ONLY_USERS))
def test_a_library_is_imported_where_it_belongs(library: str) -> None:
    users = {
        str(path.relative_to(CODE))
        for path in PACKAGE
        if any(name == library or name.startswith(library + ".") for name in _imports(path))
    }
    assert users == ONLY_USERS[library]


def test_only_the_host_layer_replaces_functions_of_torch() -> None:
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [ast.unparse(target) for target in targets]
            if path.name != "host.py":
                assert not [name for name in names if name.startswith(("torch.", "megatron"))], path


def test_pickles_and_remote_code_are_never_loaded() -> None:
    for path in PACKAGE:
        assert ".read_metadata(" not in path.read_text(), path  # torch's own runs what the file says
        assert "trust_remote_code=True" not in path.read_text(), path


def test_files_stay_short() -> None:
    folders = [ROOT / name for name in ("tests", "recipes", "bench")]
    for path in [*PACKAGE, *(path for folder in folders for path in folder.rglob("*.py"))]:
        assert len(path.read_text().splitlines()) <= LONGEST_LINES, path


def test_tests_mirror_the_package() -> None:
    rooms = {path.name for path in CODE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"support", "fakecuda", "gpu", "chaos", "bridge", "nemo"} <= rooms


def test_every_promise_has_its_test() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 20
    for path, test in named:
        assert f"\ndef {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_a_page_points_to_is_there(page: str) -> None:
    """Paths in backticks and links exist, so that the map shows the house as it is."""
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:compactlm_nemo|recipes|conf|slurm|tests|bench|docs)/[\w./]*)`", text)
    paths += [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert len(paths) > 3
    for path in paths:
        assert (ROOT / path).exists(), path
