"""The end of a sweep: one table of its runs, best first, and an exit code that says whether all are done."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.artifacts import read_manifest
from compactlm_nemo.config.failures import FAULT
from compactlm_nemo.config.sweep import JOB, worst
from compactlm_nemo.errors import CompactLMError
from compactlm_nemo.parallel.world import is_main_rank

if TYPE_CHECKING:
    from omegaconf import DictConfig

TABLE = "sweep.md"
"""File in the folder of a sweep with its table."""


class SweepTable:
    """A callback of Hydra, which conf/config.yaml names.

    `name` is the sweep that is running, None where it leaves no runs.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name

    def __getattr__(self, event: str) -> Any:
        if event.startswith("on_"):
            return lambda **_: None  # of other events there is nothing to do
        raise AttributeError(event)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print and write the table of all runs in the sweep's folder; exit with the code of those that failed."""
        if config.dry_run or self.name is None:
            return
        folder = Path(config.run.dir)
        notes = {path.parent: json.loads(path.read_text()) for path in sorted(folder.rglob(JOB))}
        if is_main_rank():
            show(folder, sweep_rows(notes))
        codes = [note["exit_code"] for note in notes.values() if note["sweep"] == self.name]
        if code := worst([FAULT if code is None else code for code in codes]):
            sys.exit(code)


def sweep_rows(notes: dict[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each run: what it sweeps, its losses, how it ended; by validation loss, those without last.

    Args:
        notes: What each run left about itself, by its folder.
    """
    rows = [{"run": note["run"]} | _results(folder) | {"ended": _end(note)} for folder, note in notes.items()]
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "ended"))
    rows = [{key: row.get(key) for key in [*keys, "ended"]} for row in rows]
    return sorted(rows, key=lambda row: (row.get("loss") is None, row.get("loss")))


def _results(run: Path) -> dict[str, Any]:
    """Return the validation loss of a run's student and what its evaluation measured."""
    results: dict[str, Any] = {}
    try:
        results["loss"] = read_manifest(run / "distill")["results"]["loss"]
        rows = json.loads((run / "evaluate" / "results.json").read_text())
        distilled = next(row for row in rows if row["model"] == "distilled")
        results |= {key: value for key, value in distilled.items() if key.startswith(("loss_", "task_"))}
    except (CompactLMError, OSError, StopIteration):
        pass  # the run has not come so far
    return results


def _end(note: dict[str, Any]) -> str:
    code = note["exit_code"]
    return "runs, or was killed" if code is None else "done" if code == 0 else f"{code}: {note['failure']}"


def show(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Print the table and write it as Markdown."""
    from rich.console import Console

    from compactlm_nemo.report.tables import comparison_markdown, print_table

    print_table(Console(), f"Runs of {folder}", rows)
    (folder / TABLE).write_text(comparison_markdown(rows))
