"""Settings of a run as a whole: its folder, its seed, and where its metrics go."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class WandbMode(Enum):
    """Where W&B metrics go; `auto` heeds WANDB_MODE, else it is online with a login and disabled without."""

    auto = "auto"
    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(kw_only=True)
class RunFolder:
    dir: str = setting(MISSING, changes_result=False)
    """Folder of this run; each stage writes its artifact into a subfolder."""

    def __post_init__(self) -> None:
        require(self.dir.strip() != "", "run.dir is empty; name a folder, for example run.dir=runs/first.")
        require("\0" not in self.dir, "run.dir holds a NUL; name a folder, for example run.dir=runs/first.")


@dataclass(kw_only=True)
class RunConfig(RunFolder):
    reuse: str | None = setting(None, changes_result=False)
    """Folder of runs: a stage that one of them has finished, with equal settings and inputs, is linked instead of made
    anew. A sweep sets it to its own folder."""
    seed: int = setting(1234)
    """Seed of calibration windows and data order."""
    time_limit: float | None = setting(None, changes_result=False)
    """Minutes after which the command saves and stops with exit code 75, early enough for a save; null takes the end
    of the Slurm job."""
    hang_minutes: float | None = setting(30.0, changes_result=False)
    """Minutes without progress after which a training names the rank that stalls and ends; null waits for ever."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.reuse != "", "run.reuse is empty; name a folder of runs, or leave it out.")
        require(0 <= self.seed < 2**32, f"run.seed={self.seed} must be in [0, 2^32), as numpy asks; 1234 is usual.")
        for name in ("time_limit", "hang_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"run.{name}={value} must be > 0; null is off.")


@dataclass(kw_only=True)
class WandbConfig:
    """Where W&B shows a training, and under which words; what is null is left to W&B's own environment."""

    mode: WandbMode = setting(WandbMode.auto, changes_result=False)
    """auto, disabled, offline or online; auto heeds WANDB_MODE, else it is online with a login and disabled without."""
    entity: str | None = setting(None, changes_result=False)
    """User or team; null takes WANDB_ENTITY, else the login's own."""
    project: str | None = setting(None, changes_result=False)
    """Project; null takes WANDB_PROJECT, else compactlm."""
    name: str | None = setting(None, changes_result=False)
    """Name of the W&B run; null takes WANDB_NAME, else the name of `run.dir`."""
    group: str | None = setting(None, changes_result=False)
    """Group of a run's trainings, those of its candidates included; null takes WANDB_RUN_GROUP, else the run's name."""
    job_type: str | None = setting(None, changes_result=False)
    """Kind of training within the group; null takes WANDB_JOB_TYPE, else the stage, or `rank` for a candidate."""
    tags: list[str] = setting([], changes_result=False)
    """Tags; none takes those of WANDB_TAGS."""
    notes: str | None = setting(None, changes_result=False)
    """A longer remark; null takes WANDB_NOTES."""
    parent: str | None = setting(None, changes_result=False)
    """Name of the run that this one is a part of, shown in its W&B config; recipes.rank and recipes.rounds set it."""

    def named(self, run_dir: str, job_type: str) -> WandbConfig:
        """Return these settings with the words that neither they nor W&B's environment give taken from the run."""
        name = self.name or os.environ.get("WANDB_NAME") or Path(run_dir).resolve().name
        return replace(
            self,
            entity=self.entity or os.environ.get("WANDB_ENTITY"),  # which W&B leaves out of offline files
            project=self.project or os.environ.get("WANDB_PROJECT") or "compactlm",
            name=name,
            group=self.group or os.environ.get("WANDB_RUN_GROUP") or name,
            job_type=self.job_type or os.environ.get("WANDB_JOB_TYPE") or job_type,
        )

    def part(self, run_dir: str, suffix: str, job_type: str) -> WandbConfig:
        """Return the settings of a run that is a part of the run in `run_dir`: in its group, with it as the parent."""
        named = self.named(run_dir, job_type)
        return replace(named, name=f"{named.name}-{suffix}", parent=named.name)


@dataclass(kw_only=True)
class VerifyConfig:
    """Settings of `recipes.verify`, which reads a run and changes nothing."""

    run: RunFolder = field(default_factory=RunFolder)
    dry_run: bool = False
    """Name the artifacts that would be read, and exit 0."""
