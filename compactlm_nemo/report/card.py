"""Tells everything that decided a student, as JSON: what made it, of which files, with which settings, to what result.

The settings are those of the manifests, not those of the command that writes the card: only they are sure to be what a
stage ran with, and by their marks they hold all that decides a result.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import compactlm_nemo
from compactlm_nemo.artifacts import MANIFEST, git_commit, package_versions, read_manifest
from compactlm_nemo.models.dims import MODEL, Dims
from compactlm_nemo.report.figures import Measured
from compactlm_nemo.search.cost import num_params

FILE = "card.json"
CARD_VERSION = 1


def ancestry(run: Path, inputs: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the manifests of all artifacts that something was made from, by artifact, sources first.

    Args:
        inputs: Of its manifest: an artifact of the run counts where it has this fingerprint.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, fingerprint in inputs.items():
        if (run / name / MANIFEST).is_file():
            manifest = read_manifest(run / name)
            if manifest["fingerprint"] == fingerprint:
                found |= ancestry(run, manifest["inputs"]) | {name: manifest}
    return found


def run_card(
    run: Path, artifact: str, *, teacher: str, measured: dict[str, Measured], inputs: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return the card of a model of a run.

    Args:
        artifact: That holds the model.
        teacher: Its name.
        measured: What is known of it by now.
        inputs: Further artifacts with their fingerprints, such as those of a report.
    """
    own = {artifact: read_manifest(run / artifact)["fingerprint"]}
    stages = ancestry(run, own | (inputs or {}))
    models = {name: name for name in ("teacher", "student") if name in stages}
    shapes = {name: Dims.load(run / name / MODEL) for name in models}
    results = stages[artifact]["results"]
    return {
        "card_version": CARD_VERSION,
        "model": artifact,
        "teacher": teacher,
        "made_with": {
            "compactlm_nemo": compactlm_nemo.__version__,
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "packages": package_versions(),
        },
        "shape": {name: {"params": num_params(dims), **dims.shape()} for name, dims in shapes.items()},
        "tokens_trained": results.get("tokens", 0),
        "seeds": sorted({manifest["seed"] for manifest in stages.values() if manifest["seed"] is not None}),
        "stages": {name: _stage(manifest) for name, manifest in stages.items()},
        "measured": {name: _metric(metric) for name, metric in measured.items()},
    }


def _stage(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest tells of its stage, without the time and without anybody's folders."""
    told = {key: manifest.get(key) for key in ("fingerprint", "digest", "git_commit", "packages", "inputs")}
    files = {name: described["sha256"] for name, described in manifest["outputs"].items()}
    return told | {key: without_folders(manifest[key]) for key in ("settings", "results")} | {"sha256": files}


def _metric(metric: Measured) -> dict[str, Any]:
    return {
        part: {model: figure._asdict() for model, figure in figures.items()}
        for part, figures in (("models", metric.models), ("against_teacher", metric.against_teacher))
    }


def without_folders(value: Any) -> Any:
    """Return a JSON value in which an absolute path is its last name: whose home it lay in decided nothing."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        return Path(value).name
    return value
