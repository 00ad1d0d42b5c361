"""What a part has found so far, on disk after every finding: a part that is stopped loses nothing."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import atomic_write_text


@dataclass(frozen=True)
class Figure:
    """A figure is one row of the table."""

    name: str
    value: float | str
    unit: str = ""
    goal: str = ""
    """As it is shown, `>= 600`; empty where there is none."""
    met: bool | None = None
    """None without a goal."""


class Record:
    """The figures and details of one part.

    Args:
        path: The file, replaced atomically.
        seconds: From now until the part is stopped.
        has_goals: Whether figures are held to their bounds, which are meant for a GPU and real sizes.
    """

    def __init__(self, path: Path, seconds: float, *, has_goals: bool = True) -> None:
        self.path, self.end, self.has_goals = path, time.monotonic() + seconds, has_goals
        self.figures: list[Figure] = []
        self.details: dict[str, Any] = {}

    def figure(
        self,
        name: str,
        value: float | str,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Add a row, with the bound that it has to keep, if it has one."""
        goal, met = "", None
        if at_least is not None and self.has_goals:
            goal, met = f">= {at_least:g}", float(value) >= at_least
        if at_most is not None and self.has_goals:
            goal, met = f"<= {at_most:g}", float(value) <= at_most
        self.figures.append(Figure(name, value, unit, goal, met))
        self._write()

    def detail(self, name: str, value: Any) -> None:
        """Keep a value that the table does not show."""
        self.details[name] = value
        self._write()

    def failed(self, name: str, error: BaseException) -> None:
        """Keep the one-line error of a measurement after which the part goes on."""
        self.details.setdefault("errors", {})[name] = one_line(error)
        self._write()

    def seconds_left(self) -> float:
        """Seconds until the part is stopped."""
        return self.end - time.monotonic()

    def _write(self) -> None:
        figures = [asdict(figure) for figure in self.figures]
        atomic_write_text(self.path, json.dumps({"figures": figures, "details": self.details}))


def one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__
