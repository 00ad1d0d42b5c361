"""The whole road: every stage in order, with a ranking of candidates where it is asked for."""

from __future__ import annotations

from dataclasses import replace

from compactlm_nemo.config.schema import Config
from compactlm_nemo.workflow.rank import rank
from compactlm_nemo.workflow.runner import run_stages
from compactlm_nemo.workflow.stage_table import stages_of


def compress(config: Config, until: str | None = None) -> None:
    """Run every stage, with a ranking between search and prune where candidates are to be trained.

    Args:
        until: The stage to end with, None for the last.
    """
    if config.rank.candidates and not config.dry_run and "prune" in stages_of(config, until):
        rank(replace(config, rank=replace(config.rank, only=None)))
    run_stages(config, until=until)
