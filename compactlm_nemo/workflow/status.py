"""Says how a run stands, from what it writes as it goes: nothing is locked or changed, and no torch is imported."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import MANIFEST
from compactlm_nemo.config.submit import StatusConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.training.tracker import LOSS, METRICS, SPEED
from compactlm_nemo.workflow import owner
from compactlm_nemo.workflow.stage_table import STAGES

SQUEUE_SECONDS = 5.0
"""Longest wait for a Slurm that does not answer."""

TAIL_BYTES = 2**16
"""End of `metrics.jsonl` that holds its last line."""


def status(config: StatusConfig) -> None:
    """Print a line a stage, who works in the folder, and a line a job.

    Raises:
        ConfigError: the folder holds no run.
    """
    run = Path(config.run.dir)
    stages = stage_lines(run)
    jobs, is_slurm_silent = _jobs(run)
    if not (stages or jobs or (run / owner.FILE).is_file()):
        raise ConfigError(
            f"run.dir={run} holds no run and no job waits for it; name the folder that a recipe wrote to."
        )
    print("\n".join([*stages, owner_line(run), *jobs]))
    if is_slurm_silent:
        print(f"jobs: unknown, squeue did not answer within {SQUEUE_SECONDS:g} s")


def stage_lines(run: Path, prefix: str = "", whole: Path | None = None) -> list[str]:
    """Return a line for each stage that is done or begun, those of candidates and rounds below the run too.

    Args:
        whole: Run that the candidate `run` is a part of; stages that it links to are told there.
    """
    lines = []
    for stage in STAGES.values():
        is_shared = whole is not None and (run / stage.writes).resolve().parent == whole.resolve()
        if not is_shared and (told := _stage(run, stage.name, stage.writes)):
            lines.append(f"{prefix}{stage.name}: {told}")
    for part in [*sorted(run.glob("rank/*/")), *sorted(run.glob("round_*/"))]:
        lines += stage_lines(part, f"{prefix}{part.relative_to(run)} ", whole=run)
    return lines


def _stage(run: Path, name: str, artifact: str) -> str:
    """Return how a stage stands, empty where nothing is begun."""
    manifest = run / artifact / MANIFEST
    if manifest.is_file():
        results = _read(manifest).get("results") or {}
        is_training = isinstance(results.get("loss"), float) and isinstance(results.get("tokens"), int)
        told = (
            f", {results['tokens']:,} tokens, held-out loss {results['loss']:.4f} nats a token" if is_training else ""
        )
        return f"done {_ago(manifest)} ago{told}"
    progress = run / "progress" / name
    if (progress / METRICS).is_file():
        return _training(progress)
    newest = max(progress.glob("*"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None:
        return f"begun, last written {_ago(newest)} ago"
    return "begun" if (run / artifact).is_dir() else ""


def _training(progress: Path) -> str:
    """Return steps, tokens, loss and time left of a training, from its settings and the end of its metrics."""
    line, done, steps, step_tokens = steps_done(progress)
    if not line:
        return "begun, no step yet"
    parts = [f"step {done} of {steps}" if steps else f"step {done}"]
    if step_tokens:
        parts.append(f"{done * step_tokens:,}" + (f" of {steps * step_tokens:,} tokens" if steps else " tokens"))
    if line.get(LOSS) is not None:
        parts.append(f"loss {line[LOSS]:.4f}")
    if line.get(SPEED):
        parts.append(f"{line[SPEED]:,.0f} tokens/s")
        if steps:
            parts.append(f"{timedelta(seconds=round((steps - done) * step_tokens / line[SPEED]))} of training left")
    return ", ".join([*parts, f"last step {_ago(progress / METRICS)} ago"])


def steps_done(progress: Path) -> tuple[dict[str, Any], int, int | None, int]:
    """Return a training's last line of metrics, its steps so far, those of the whole, and the tokens of a step."""
    settings, line = _read(progress / "settings.json"), _last_line(progress / METRICS)
    step_tokens = settings.get("distill.global_batch", 0) * settings.get("data.sequence_length", 0)
    return line, int(line.get("step", -1)) + 1, settings.get("distill.steps"), step_tokens


def _last_line(path: Path) -> dict[str, Any]:
    """Return the last whole line of metrics, however long the file is."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    for line in reversed(lines):
        if (read := _json(line)) and "step" in read:
            return read
    return {}


def owner_line(run: Path) -> str:
    """Return who works in the folder; of a process on another host only its job can tell whether it is alive."""
    found = _read(run / owner.FILE)
    if not found:
        return "nobody works here"
    job = f", job {found['job']}" if found.get("job") else ""
    who = f"process {found.get('pid')} on {found.get('host')}{job}, since {found.get('time')}"
    if found.get("host") != socket.gethostname():
        return f"at work: {who}, unless it was killed"
    return f"at work: {who}" if Path(f"/proc/{found.get('pid')}").exists() else f"nobody works here; killed was {who}"


def _jobs(run: Path) -> tuple[list[str], bool]:
    """Return a line for each waiting or running job of the run, and whether Slurm did not answer.

    `recipes.submit` notes `run.dir` as the comment of its jobs; others are known by the owner's number.
    """
    if not shutil.which("squeue"):
        return [], False
    found = _read(run / owner.FILE)
    command = ["squeue", "--noheader", f"--user={os.geteuid()}", "--format=%i|%j|%T|%D|%L|%S|%r|%k"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except subprocess.TimeoutExpired:
        return [], True
    lines = []
    for text in done.stdout.splitlines() if done.returncode == 0 else []:
        number, name, state, nodes, left, start, reason, comment = text.split("|", 7)
        if comment != str(run.absolute()) and number != found.get("job"):
            continue
        more = f"{left} left" if state == "RUNNING" else f"{reason}, start {start}"
        lines.append(f"job {number} ({name}): {state.lower()} on {nodes} nodes, {more}")
    return lines, False


def _read(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, empty where it is missing or no such thing."""
    try:
        return _json(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _ago(path: Path) -> timedelta:
    return timedelta(seconds=round(max(0.0, time.time() - path.stat().st_mtime)))
