"""Checks a whole run on disk: hashes of every file, and that every artifact was made from those that are there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from compactlm_nemo.artifacts import (
    HASHES,
    MANIFEST,
    damaged_seals,
    differences,
    file_problems,
    fingerprint,
    is_unfinished,
    read_manifest,
)
from compactlm_nemo.config.run import VerifyConfig
from compactlm_nemo.errors import CheckpointError, ConfigError, listed
from compactlm_nemo.workflow.stage_table import MAKERS


def verify(config: VerifyConfig) -> None:
    """Read every file of a run and print a line an artifact.

    Raises:
        ConfigError: the folder holds no run.
        CheckpointError: something is damaged or does not belong together; every problem is named.
    """
    run, console = Path(config.run.dir), Console(soft_wrap=True, highlight=False)
    folders = list(_folders(run)) if run.is_dir() else []
    if not folders:
        raise ConfigError(f"run.dir={run} holds no run; name the folder that recipes.compress wrote to.")
    problems: list[str] = []
    for folder in folders:
        if config.dry_run:
            console.print(f"{folder}: would be read", markup=False)
            continue
        found, num_files = _problems(folder)
        problems += found
        told = found[0] if found else "not finished" if is_unfinished(folder) else f"{num_files} files as written"
        console.print(f"{folder}: {told}", markup=False)
    if problems:
        raise CheckpointError(listed([f"{problem}; delete that folder and run again." for problem in problems]))


def _folders(run: Path) -> Iterator[Path]:
    """Yield artifacts, unfinished work and training checkpoints of a run and of the candidates below it."""
    for artifact in MAKERS:
        if (run / artifact).is_dir() and not (run / artifact).is_symlink():
            yield run / artifact
    for progress in sorted((run / "progress").glob("*")) if (run / "progress").is_dir() else []:
        yield progress
        yield from sorted(path.parent for path in progress.glob(f"*/step_*/{HASHES}"))
    for candidate in sorted((run / "rank").glob("*/")) if (run / "rank").is_dir() else []:
        yield from _folders(candidate)


def _problems(folder: Path) -> tuple[list[str], int]:
    """Return what is wrong with a folder, and the number of files whose content was looked at."""
    if (folder / HASHES).is_file():
        recorded = _json(folder / HASHES)
        if recorded is None:
            return [f"{folder / HASHES} is damaged"], 0
        return file_problems(folder, recorded), len(recorded)
    if "progress" in folder.parts[-2:]:
        return list(damaged_seals(folder).values()), len(list(folder.glob(".*.sha256")))
    if is_unfinished(folder):
        return [], 0
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)], 0
    return file_problems(folder, manifest["outputs"]) + _chain_problems(folder, manifest), len(manifest["outputs"])


def _chain_problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return whether a manifest's fingerprint is that of its settings, and its inputs are those of the run."""
    problems = []
    if manifest["fingerprint"] != fingerprint(manifest["settings"], manifest["inputs"]):
        problems.append(f"{folder / MANIFEST} was changed: its fingerprint is not that of its settings and inputs")
    present = {name: folder.parent / name for name in manifest["inputs"] if name in MAKERS}
    made = {name: read["fingerprint"] for name, path in present.items() if (read := _json(path / MANIFEST))}
    known = {name: manifest["inputs"][name] for name in made}
    return problems + [f"{folder} was made from another {found}" for found in differences(known, made)]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
