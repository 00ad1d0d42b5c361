"""The rules of the code's layout, read from the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF

ROOT = CONF.parent
PACKAGE = sorted((ROOT / "compactlm_nemo").rglob("*.py"))
LONGEST_LINES = 400

# Library (or part of one) -> the only files that may import it.
ONLY_USERS = {
    "hydra": {"config/load.py"},
    "omegaconf": {"config/load.py", "config/evaluate.py", "config/model.py", "config/run.py"},
    "megatron.core.parallel_state": {"parallel/mesh.py", "parallel/launch.py"},
    "wandb": {"training/tracker.py"},
}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("library", sorted(ONLY_USERS))
def test_a_library_is_imported_where_it_belongs(library: str) -> None:
    users = {
        str(path.relative_to(ROOT / "compactlm_nemo"))
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
        if path.name != "checkpoint_metadata.py":  # whose reader has a list of what may be looked up
            assert "pickle" not in {name.split(".")[0] for name in _imports(path)}, path
        assert ".read_metadata(" not in path.read_text(), path  # torch's own runs what the file says
        assert "trust_remote_code=True" not in path.read_text(), path


def test_files_stay_short() -> None:
    for path in [*PACKAGE, *(ROOT / "tests").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= LONGEST_LINES, path


# A module imports only what stands at or above its own place.
ORDER = [
    "errors", "config", "artifacts", "parallel", "data", "models", "progress", "losses", "importance", "evaluation",
    "training", "search", "pruning", "distill", "report", "stages", "workflow",
]  # fmt: skip


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_upwards(path: Path) -> None:
    parts = path.relative_to(ROOT / "compactlm_nemo").with_suffix("").parts
    if parts[0] == "__init__":
        return
    for name in _imports(path):
        if name.startswith("compactlm_nemo."):
            used = name.split(".")[1]
            assert ORDER.index(used) <= ORDER.index(parts[0]), f"{path} imports {name}"
