"""A sweep: every combination of the values that a command line lists is a run of its own, below `run.dir`.

A run that fails does not stop the others, one that is finished is skipped, so the same command goes on with what is
left. Each run leaves `sweep.json`: what it sweeps, and how it ended. Artifacts that a run would make like another of
the sweep, or like `run.dir` itself, are taken from there (`run.reuse`).
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from compactlm_nemo.config.failures import FAULT, GATE, TRY_AGAIN, USER, explain, pipe_closed, report
from compactlm_nemo.config.overrides import parse
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError, GateFailed, Interrupted

T = TypeVar("T")

JOB = "sweep.json"
"""File in the folder of each run of a sweep."""

_URGENCY = (TRY_AGAIN, FAULT, USER, GATE)
"""Exit codes, the one first that a sweep ends with when several of its runs fail: a requeue serves the first."""


@dataclass
class Sweep:
    """One sweep of a command; a launcher may pickle it for jobs elsewhere."""

    swept: list[str]
    dry_run: bool
    leaves_runs: bool = True
    """Whether it leaves anything: a recipe that only looks does not."""
    name: str = field(default_factory=lambda: f"sweep-{uuid.uuid4().hex}")
    process: int = field(default_factory=os.getpid)
    codes: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, overrides: list[str], leaves_runs: bool = True) -> Sweep:
        """Return the sweep that overrides of Hydra's grammar ask for."""
        parsed = [parse(text) for text in overrides]
        swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
        if "run.dir" in swept:
            raise ConfigError("run.dir is the folder of the whole sweep, each run has its own below it; give one.")
        values = {override.key_or_group: override.value() for override in parsed if not override.is_sweep_override()}
        sweep = cls(swept, values.get("dry_run") is True, leaves_runs)
        if _is_one_of_many_ranks() and any(
            key in ("hydra/launcher", "hydra/sweeper") or "${now" in str(value) for key, value in values.items()
        ):
            raise ConfigError(
                "under torchrun every rank sweeps by itself, in the same order; leave out hydra/launcher, "
                "hydra/sweeper and ${now:...}, or start the sweep without torchrun."
            )
        return sweep

    def overrides(self, overrides: list[str], scratch: str) -> list[str]:
        """Return the overrides with which Hydra sweeps: folders are named by what is swept alone.

        A dry run, a recipe that leaves nothing, and each rank but the main one, lets Hydra's notes go into `scratch`.
        """
        if self.dry_run:  # which submits nothing
            overrides = [text for text in overrides if not text.startswith(("hydra/launcher", "hydra.launcher"))]
        given = {parse(text).key_or_group for text in overrides}
        extra = [
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(given - set(self.swept)))}]",
            f"hydra.callbacks.sweep.name={self.name if self.leaves_runs else 'null'}",
        ]
        if self.dry_run or not self.leaves_runs or not _is_main_rank():
            extra.append(f"hydra.sweep.dir='{scratch}'")
        return [*overrides, *extra]

    def run_job(self, compose: Callable[[], T], run: Callable[[T], None], run_dir: str, subfolder: str) -> None:
        """Run one of the sweep's runs in its folder below `run_dir`, and note how it ended."""
        folder = None if self.dry_run or not self.leaves_runs else str(Path(run_dir) / subfolder)
        try:
            print(f"{'plan of ' if self.dry_run else ''}{Path(run_dir) / subfolder}", flush=True)
            self._note(folder, subfolder, None, "")
            config = self._config(compose(), subfolder)
            run(config)  # type: ignore[arg-type]
        except BrokenPipeError:
            sys.exit(pipe_closed())
        except Exception as error:
            failure = explain(error, folder)
            code = report(failure, error, folder)
            self._note(folder, subfolder, code, failure.line)
            is_over = isinstance(error, Interrupted) or (_is_one_of_many_ranks() and not isinstance(error, GateFailed))
            if os.getpid() == self.process and is_over:
                sys.exit(code)  # the job ends, or the ranks are out of step: nothing more can run here
        else:
            self._note(folder, subfolder, 0, "")

    def _config(self, config: Any, subfolder: str) -> Config:
        """Return the settings of one run: its folder, where it may find artifacts, and its name in W&B."""
        assert isinstance(config, Config)
        return replace(
            config,
            run=replace(
                config.run, dir=str(Path(config.run.dir) / subfolder), reuse=config.run.reuse or config.run.dir
            ),
            wandb=config.wandb.part(config.run.dir, subfolder, job_type="sweep"),
        )

    def _note(self, folder: str | None, subfolder: str, code: int | None, line: str) -> None:
        if code is not None:
            self.codes.append(code)
        if folder is None or not _is_main_rank():
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        note = {"sweep": self.name, "run": subfolder, "exit_code": code, "failure": line}
        (Path(folder) / JOB).write_text(json.dumps(note, indent=2) + "\n")

    def exit_code(self) -> int:
        """Return the exit code of the runs that this process has made: 0 when all are done."""
        return worst(self.codes)


def worst(codes: list[int]) -> int:
    """Return the exit code of a sweep from those of its runs."""
    failed = set(codes) - {0}
    return next((code for code in _URGENCY if code in failed), max(failed, default=0))


def _is_one_of_many_ranks() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
