"""What a run has made becomes artifacts of its W&B run, by reference: each once, however often the run goes on."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import MANIFEST, atomic_write_text, read_manifest, settings_of
from compactlm_nemo.config.schema import Config
from compactlm_nemo.training.tracker import METRICS
from compactlm_nemo.training.wandb_run import WandbRun, wandb_mode
from compactlm_nemo.workflow.owner import owned

LOGGED = "wandb_artifacts.json"
"""Beside the training's `wandb_id`: artifact -> the manifest's digest with which W&B has it."""

KINDS = {"distill": "model", "export": "model", "report": "report"}
"""Artifact of a run -> its type at W&B."""

LOSSES = {"distill": ("distill", "loss"), "student": ("student", "loss_after"), "teacher": ("student", "loss_before")}
"""Model that an artifact is or holds, the one made last first -> where its validation loss is written."""

_LONGEST_NAME = 128

_log = logging.getLogger(__name__)


def log_artifacts(config: Config) -> None:
    """Log every finished artifact of `KINDS` that the W&B run of the distillation lacks; on the main rank alone.

    W&B gets a name (that of the W&B run and the artifact), references to the files, and `metadata`. A kill between
    W&B's word and ours logs an artifact again, which W&B takes for the version that it has, as no file differs.
    """
    run = Path(config.run.dir)
    progress = run / "progress" / "distill"
    logged = _read(progress / LOGGED)
    manifests = {name: read_manifest(run / name) for name in KINDS if (run / name / MANIFEST).is_file()}
    lacking = {name: found for name, found in manifests.items() if logged.get(name) != found.get("digest", "")}
    if not lacking or "distill" not in manifests:  # the W&B run is the training's
        return
    cfg = config.wandb.named(config.run.dir, job_type="distill")
    if wandb_mode(cfg.mode) == "disabled":
        _log.warning("wandb.log_artifacts=true logs nothing, as W&B is off: no login, or WANDB_MODE says so.")
        return
    with owned(run):
        progress.mkdir(parents=True, exist_ok=True)
        lines = [json.loads(line) for line in (run / "distill" / METRICS).read_text(encoding="utf-8").splitlines()]
        wandb_run = WandbRun(progress, cfg, settings_of(asdict(config)), lines)
        for name, manifest in lacking.items():
            title = f"{cfg.name}-{name}".replace("/", "-")[-_LONGEST_NAME:]
            wandb_run.log_folder(title, KINDS[name], run / name, metadata(run, name, manifest))
        if wandb_run.finish(exit_code=0):
            now = logged | {name: manifest.get("digest", "") for name, manifest in lacking.items()}
            atomic_write_text(progress / LOGGED, json.dumps(now, indent=2) + "\n")


def metadata(run: Path, name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what tells an artifact apart: hashes of its manifest, commit, results, and losses in nats a token.

    `sha256` has the lines that `sha256sum --check` reads in the folder; W&B allows 100 keys and any number of lines.
    """
    model = next(artifact for artifact in LOSSES if artifact in (name, *manifest["inputs"]))
    folder, key = LOSSES[model]
    losses: dict[str, Any] = {"validation": read_manifest(run / folder)["results"][key]}
    if name == "report":
        for row in json.loads((run / "evaluate" / "results.json").read_text(encoding="utf-8")):
            losses[row["model"]] = {key: value for key, value in row.items() if key.startswith("loss_")}
    return {
        "fingerprint": manifest["fingerprint"],
        "digest": manifest.get("digest"),
        "git_commit": manifest.get("git_commit"),
        "sha256": [f"{described['sha256']}  {file}" for file, described in manifest["outputs"].items()],
        "results": manifest["results"],
        "losses": losses,
    }


def _read(path: Path) -> dict[str, str]:
    """Return what W&B has; nothing where the file is missing or damaged, then all is logged again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
