"""Settings of a run as a whole: its folder, its seed, and where its metrics go."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class WandbMode(Enum):
    """Where W&B metrics go; `auto` is online with a login in the environment and disabled without."""

    auto = "auto"
    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(kw_only=True)
class RunConfig:
    dir: str = MISSING
    """Folder of this run; each stage writes its artifact into a subfolder."""
    seed: int = 1234
    """Seed of calibration windows and data order."""


@dataclass(kw_only=True)
class WandbConfig:
    mode: WandbMode = WandbMode.auto
    """auto, disabled, offline or online."""
    project: str = "compactlm"
    """W&B project."""
    name: str | None = None
    """Run name; null takes the name of `run.dir`."""
