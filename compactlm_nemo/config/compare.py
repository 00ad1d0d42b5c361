"""Settings of the comparison of runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.config.run import WandbMode, WandbProject
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class WandbTable(WandbProject):
    """Where a table goes at W&B."""

    mode: WandbMode = setting(WandbMode.disabled, changes_result=False)
    """disabled, offline, online, or auto, which heeds WANDB_MODE and is else online with a login."""
    name: str | None = setting(None, changes_result=False)
    """Name of the W&B run that has the table; null leaves it to W&B."""


@dataclass(kw_only=True)
class CompareRunsConfig:
    """Settings of `recipes.compare`, which reads runs and changes none."""

    runs: list[str] = field(default_factory=list)
    """Folders of runs, finished or not; words without `=` are such folders, and words that are folders."""
    out: str | None = None
    """Folder that gets compare.md, compare.json and compare.png; null prints the table alone."""
    wandb: WandbTable = field(default_factory=WandbTable)
    dry_run: bool = False
    """Look whether the folders are runs, print the resolved configuration, and exit 0."""

    def __post_init__(self) -> None:
        require(bool(self.runs), "runs is empty; name folders of runs, as in recipes.compare runs/a runs/b.")
        twice = sorted({run for run in self.runs if self.runs.count(run) > 1})
        require(not twice, f"runs={', '.join(twice)} is named twice; name each run once.")
        require(self.out is None or self.out.strip() != "", "out is empty; name a folder, or leave it out.")
        require(
            self.wandb.mode is WandbMode.disabled or self.out is not None,
            f"wandb.mode={self.wandb.mode.name} keeps W&B's files in the folder `out`; name one, as out=runs/compared.",
        )
