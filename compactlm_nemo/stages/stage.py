"""What a stage is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactlm_nemo.config.schema import Config


@dataclass(frozen=True)
class Stage:
    """One verb: its folder, the stages whose results it reads, and the settings that decide its result."""

    name: str
    folder: str
    needs: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    inputs: Callable[[Config], dict[str, Path]] = lambda config: {}
