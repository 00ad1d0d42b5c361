"""The contract of a stage: one object that says all that others need to know of it.

A stage is a file of this folder with an object `STAGE`, and a line in `workflow/stage_table.py`. The file imports
nothing heavy until `run` is called: every command reads the table first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.schema import Config

if TYPE_CHECKING:
    from compactlm_nemo.models.dims import Dims
    from compactlm_nemo.stages.context import Run


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run, from the artifacts of other stages to its own."""

    name: str
    """Its recipe is `recipes.NAME`, its unfinished work is in `progress/NAME`."""
    summary: str
    """What it turns into what, in one line, for the manual."""
    reads: tuple[str, ...]
    """Artifacts, folders of `run.dir`, that it may open; `Run.path` refuses all others."""
    writes: str
    """Its own artifact."""
    settings: Callable[[Config], dict[str, Any]]
    """What decides its result beside what it reads: `config.fingerprint.result_settings` of sections, and single
    values."""
    run: Callable[[Run, Path], dict[str, Any] | None]
    """Does the work: (settings on a mesh, empty folder of the artifact) -> results for the manifest, or None when it
    stopped before its end. All ranks call it; only the main rank writes plain files."""
    may_read: dict[str, Callable[[Config], bool]] = field(default_factory=dict)
    """Further artifacts, each with the settings under which it is read."""
    files: Callable[[Config], dict[str, Path]] = lambda config: {}
    """The user's files that it reads, by name; their content decides its result too."""
    is_wanted: Callable[[Config], bool] = lambda config: True
    """Whether a whole run with these settings has this stage."""
    problems: Callable[[Config, list[Dims]], list[str]] = lambda config, models: []
    """Broken rules between settings, a line each; `models` are the teacher and every candidate, where they are
    known."""
    is_gated: bool = False
    """Whether it lets the model leave: it is left out where the gate fails."""
    plan: Callable[[Config], list[str]] = lambda config: []
    """Further lines of a dry run, about what it would do outside of `run.dir`."""

    def artifacts(self, config: Config) -> tuple[str, ...]:
        """Return every artifact that it reads with these settings."""
        return self.reads + tuple(artifact for artifact, is_read in self.may_read.items() if is_read(config))
