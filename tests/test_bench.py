"""The measurements are all listed, tell how they are used, and compare equal things; their figures vary by machine."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from torch.testing import assert_close

from bench.common.teacher import ASSETS, CACHE
from bench.common.worker import ROOT
from bench.distill.head import WAYS, Subject
from tests.support import commands

BENCH = Path(__file__).parents[1] / "bench"
OPTIONS = {
    "bench.importance": "--samples",
    "bench.importance.experts": "--seeds",
    "bench.pruning.pairs": "--samples",
    "bench.pruning": "--seeds",
    "bench.pruning.blocks": "--windows",
    "bench.distill.linear_kd": "--tokens",
    "bench.distill.distill_step": "--repeats",
    "bench.distill.orderings": "--steps",
    "bench.distill.recovery": "--rates",
    "bench.plan": "--runs",
    "bench.gpu": "--minutes",
}
"""Command -> one of its options."""


def _listed(section: str) -> dict[str, list[str]]:
    """Module -> the other cells of its row, in a table of bench/README.md."""
    text = (BENCH / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    modules = {row[0].strip("`"): row[1:] for row in rows}
    assert modules and len(modules) == len(rows), section
    return modules


def _modules(*, started: bool) -> set[str]:
    """Modules of bench/ that run when started, or those that do nothing then; not the empty files of packages."""
    files = [path for path in BENCH.rglob("*.py") if path.name != "__init__.py" and ".venv-" not in str(path)]
    paths = [path for path in files if ('if __name__ == "__main__":' in path.read_text()) == started]
    return {".".join(path.relative_to(BENCH.parent).with_suffix("").parts).removesuffix(".__main__") for path in paths}


def test_every_module_is_listed_as_command_worker_or_part() -> None:
    commands, workers, parts = map(_listed, ("Commands", "Workers", "Parts"))
    assert set(commands) | set(workers) == _modules(started=True)
    assert not set(commands) & set(workers)
    assert set(parts) == _modules(started=False)
    assert set(commands) == set(OPTIONS), "the help of each command is tested"
    assert all(all(cells) for table in (commands, workers, parts) for cells in table.values())


def test_a_worker_is_started_by_the_commands_that_are_said_to() -> None:
    for worker, (_, starters) in _listed("Workers").items():
        for starter in re.findall(r"`([\w.]+)`", starters):
            path = BENCH.parent / starter.replace(".", "/")
            source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            assert f'"{worker}"' in source.read_text(), (worker, starter)


def test_results_caches_and_assets_lie_where_they_are_kept() -> None:
    assert (CACHE, ASSETS, ROOT) == (BENCH / ".cache", BENCH.parent / "runs" / "assets", BENCH.parent)
    for name in OPTIONS:
        results = importlib.import_module(f"{name}.__main__" if (BENCH / name[6:]).is_dir() else name).RESULTS
        assert BENCH / "results" in (results, results.parent), name


@pytest.mark.parametrize(("name", "option"), OPTIONS.items())
def test_help(name: str, option: str) -> None:
    done = commands.run(["-m", name, "--help"])
    assert done.returncode == 0, done.stderr
    assert f"python -m {name}" in done.stdout and option in done.stdout


def test_our_head_and_the_plain_one_compute_the_same() -> None:
    plain, ours = (Subject(WAYS[way](), hidden=16, vocab=50).once(tokens=10) for way in ("plain torch", "ours"))
    assert plain.keys() == ours.keys()
    for name, value in plain.items():
        assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
