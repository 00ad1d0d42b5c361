"""Settings of a run as a whole: its folder, its seed, and where its metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class WandbMode(Enum):
    """Where W&B metrics go; `auto` is online with a login in the environment and disabled without."""

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
    seed: int = setting(1234)
    """Seed of calibration windows and data order."""
    time_limit: float | None = setting(None, changes_result=False)
    """Minutes after which the command saves and stops with exit code 75, early enough for a save; null takes the end
    of the Slurm job."""
    hang_minutes: float | None = setting(30.0, changes_result=False)
    """Minutes without progress after which a training names the rank that stalls and ends; null waits for ever."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 2**32, f"run.seed={self.seed} must be in [0, 2^32), as numpy asks; 1234 is usual.")
        for name in ("time_limit", "hang_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"run.{name}={value} must be > 0; null is off.")


@dataclass(kw_only=True)
class WandbConfig:
    mode: WandbMode = setting(WandbMode.auto, changes_result=False)
    """auto, disabled, offline or online."""
    project: str = setting("compactlm", changes_result=False)
    """W&B project."""
    name: str | None = setting(None, changes_result=False)
    """Run name; null takes the name of `run.dir`."""


@dataclass(kw_only=True)
class VerifyConfig:
    """Settings of `recipes.verify`, which reads a run and changes nothing."""

    run: RunFolder = field(default_factory=RunFolder)
    dry_run: bool = False
    """Name the artifacts that would be read, and exit 0."""
