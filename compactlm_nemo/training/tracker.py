"""Metrics of a training: one JSON line a step, the console, and Weights & Biases when asked."""

from __future__ import annotations

import json
import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from compactlm_nemo.artifacts import atomic_write_text
from compactlm_nemo.config.run import WandbConfig
from compactlm_nemo.training.wandb_run import WandbRun

METRICS = "metrics.jsonl"
LOSS, LM_LOSS, TEACHER_LM_LOSS = "train/loss", "train/lm_loss_nats", "train/teacher_lm_loss_nats"
"""The loss that is trained, which the console shows, and the language-model losses of both models."""
CORRECTION_LOSS = "train/correct_loss"
"""The loss of a teacher that is trained beside its student."""
SPEED = "perf/tokens_per_second"
"""Metric shown on the console."""

_log = logging.getLogger(__name__)
_PLAIN_LINES = 10


def truncate_metrics(path: Path, step: int, every: int = 1) -> None:
    """Drop the lines of `step` and later, and any line that a crash cut short, before training goes on at `step`.

    Lines that are damaged or missing, of one in `every` steps, are told: the training itself is not touched.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    steps = [(_step_of(line), line) for line in text.splitlines()]
    if num_damaged := sum(found is None for found, _ in (steps if text.endswith("\n") else steps[:-1])):
        _log.warning("%s: %d lines are damaged and left out; the training itself is not touched.", path, num_damaged)
    kept = [(found, line) for found, line in steps if found is not None and found < step]
    if (num_missing := step // every - len({found for found, _ in kept})) > num_damaged:
        _log.warning("%s: %d lines of %d steps are gone; the training itself is not touched.", path, num_missing, step)
    if text:
        atomic_write_text(path, "".join(f"{line}\n" for _, line in kept))


class Tracker:
    """Writes the metrics of a training; a context manager around its loop.

    Args:
        folder: Stage folder, `run.dir/<stage>`; gets `metrics.jsonl`, `wandb_id` and `wandb/`.
        wandb_cfg: Mode and words of the W&B run.
        config: Shown as the W&B run's config; must hold no secret.
        is_writer: False on all ranks but one: every call is then free and without effect.
        total_steps: Steps of the whole training, those before a resume included.
        start_step: 0-based step at which this process begins; later lines of an earlier process are dropped.
        log_every: One step in so many is logged.
    """

    def __init__(
        self,
        folder: Path,
        wandb_cfg: WandbConfig,
        config: dict[str, Any],
        is_writer: bool,
        total_steps: int,
        *,
        start_step: int = 0,
        log_every: int = 1,
    ) -> None:
        self._folder, self._wandb_cfg, self._config = folder, wandb_cfg, config
        self._is_writer, self._total_steps, self._start_step = is_writer, total_steps, start_step
        self._log_every = log_every

    def __enter__(self) -> Tracker:
        if self._is_writer:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open_metrics(self._start_step)
            self._wandb = WandbRun(self._folder, self._wandb_cfg, self._config, self._lines())
            self._console = _ConsoleView(self._total_steps, self._start_step)
        return self

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of 0-based `step`; a value that is not finite becomes null in the file."""
        if not self._is_writer:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._console.show(step, values)
        self._wandb.log(step, values)

    def rewind(self, step: int) -> None:
        """Drop the lines of 0-based `step` and later, from where training goes on; W&B keeps what it has."""
        if self._is_writer:
            self._file.close()
            self._open_metrics(step)

    def _open_metrics(self, step: int) -> None:
        truncate_metrics(self._folder / METRICS, step, self._log_every)
        self._file = (self._folder / METRICS).open("a", encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_writer:
            return
        self._console.close()
        self._file.close()
        self._wandb.finish(exit_code=0 if kind is None else 1)

    def _lines(self) -> list[dict[str, Any]]:
        """Return the lines of earlier processes, from which training goes on."""
        return [json.loads(line) for line in (self._folder / METRICS).read_text(encoding="utf-8").splitlines()]


class _ConsoleView:
    """Shows a progress bar on a terminal; elsewhere about ten plain lines."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._total_steps, self._start_step = total_steps, start_step
        self._start_time = time.monotonic()
        self._console = Console(soft_wrap=True, highlight=False)
        self._lines_due = start_step * _PLAIN_LINES // total_steps
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("", total=total_steps, completed=start_step)
            self._progress.start()

    def show(self, step: int, values: dict[str, float]) -> None:
        num_done = step + 1
        text = self._text(num_done, values)
        if self._progress is not None:
            self._progress.update(self._task, completed=num_done, description=text)
        elif (line := num_done * _PLAIN_LINES // self._total_steps) > self._lines_due:
            self._lines_due = line
            self._console.print(f"step {num_done}/{self._total_steps}  {text}", markup=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _text(self, num_done: int, values: dict[str, float]) -> str:
        seconds_each = (time.monotonic() - self._start_time) / max(1, num_done - self._start_step)
        remaining = timedelta(seconds=round(seconds_each * (self._total_steps - num_done)))
        parts = [f"loss {values[LOSS]:.4f}"] if LOSS in values else []
        parts += [f"{values[SPEED]:,.0f} tokens/s"] if SPEED in values else []
        return "  ".join([*parts, f"{remaining} left"])


def _step_of(line: str) -> int | None:
    """Return the step of a line, None of one that is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
