"""The prepared dashboard of a training: one table of panels, from which docs/dashboards.md and W&B's workspace come."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from compactlm_nemo.config.run import DashboardConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.training.wandb_run import default_entity, has_login


@dataclass(frozen=True)
class Panel:
    """A line plot over W&B's step."""

    title: str
    metrics: tuple[str, ...]
    """Names as in the table of metrics: a word in capitals stands for any word."""
    is_wrong_when: str

    @property
    def regex(self) -> str:
        """Regular expression that matches the names of its metrics as a whole, and no other."""
        return "^(" + "|".join(re.sub(r"[A-Z]+", lambda _: r"\w+", name) for name in self.metrics) + ")$"


PANELS = (
    Panel(
        "Losses",
        ("train/loss", "train/kd_NAME"),
        "they rise, or differ from the start of an earlier run with the same batches",
    ),
    Panel(
        "Student and teacher",
        ("train/lm_loss_nats", "train/teacher_lm_loss_nats"),
        "the teacher's is not that of its evaluation: wrong tokenizer, template or data",
    ),
    Panel("Held out", ("eval/TEXT_lm_loss_nats", "eval/TEXT_kl_nats"), "they part from the training losses"),
    Panel("KL by position", ("eval/TEXT_kl_nats_from_POSITION",), "it rises with the position: long context is lost"),
    Panel("Gradient norm", ("train/grad_norm",), "it jumps before the loss does"),
    Panel("Learning rate", ("train/lr",), "its shape is not the schedule's"),
    Panel("Speed", ("perf/tokens_per_second", "perf/mfu"), "it sags: a slow node, or data that comes late"),
    Panel(
        "Saving",
        ("perf/checkpoint_share",),
        "it is more than a few hundredths: save less often, on a faster disk, or set `distill.checkpoint_async`",
    ),
    Panel("Memory", ("perf/peak_memory_bytes", "perf/planned_memory_bytes"), "it grows with the steps"),
    Panel("Stability", ("train/skipped_steps", "train/rewinds"), "they are more than a few"),
)
"""What to look at, top to bottom."""


def panels_markdown() -> str:
    """Return the panels as the table of docs/dashboards.md."""
    rows = [(panel.title, ", ".join(f"`{name}`" for name in panel.metrics), panel.is_wrong_when) for panel in PANELS]
    return "| Panel | Metrics | What is wrong when |\n|---|---|---|\n" + "".join(
        f"| {' | '.join(row)} |\n" for row in rows
    )


def save_dashboard(config: DashboardConfig) -> None:
    """Save the panels as a workspace of a project at W&B, and print its address.

    Raises:
        ConfigError: the library or a login is missing, or W&B does not take the workspace.
    """
    entity, project = config.wandb.known_entity, config.wandb.known_project
    console = Console(soft_wrap=True, highlight=False)
    if config.dry_run:
        console.print(
            f"dashboard: saves {config.title} to {entity or 'the entity of the login'}/{project}", markup=False
        )
        console.print(panels_markdown(), markup=False)
        return
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("recipes.dashboard needs wandb-workspaces; pip install 'compactlm-nemo[dashboard]'.")
    if not has_login():
        raise ConfigError("recipes.dashboard needs a login at W&B; set WANDB_API_KEY or run wandb login.")
    try:
        saved = workspace(config.title, entity or default_entity(), project).save()
    except Exception as error:  # of the network, the login, the project: W&B has no base class for them
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"W&B does not take the dashboard for {entity or 'the entity of the login'}/{project} "
            f"({type(error).__name__}: {reason}); look at wandb.entity, wandb.project and the network, and try again."
        ) from error
    console.print(f"dashboard: {saved.url}", markup=False)


def workspace(title: str, entity: str | None, project: str) -> Any:
    """Return the panels as a workspace of wandb-workspaces, not yet saved."""
    from wandb_workspaces.reports.v2 import LinePlot
    from wandb_workspaces.workspaces import Section, Workspace

    plots = [LinePlot(title=panel.title, x="Step", metric_regex=panel.regex) for panel in PANELS]
    section = Section(name=title, panels=plots, is_open=True, pinned=True)
    return Workspace(entity=entity, project=project, name=title, sections=[section])
