"""The search stage: scores and budgets become ranked candidates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.config.prune import BLOCK_SETTINGS
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.score import ExpertMetric
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.profiled import profile_problems
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def search_settings(config: Config) -> dict[str, Any]:
    """Return what decides the candidates: how they are cut too, and the layout where it decides which there are.

    Their layers are not trained (`prune.blocks`).
    """
    cfg = config.search
    later = ("candidate", "blocks", *BLOCK_SETTINGS)
    prune = {name: value for name, value in result_settings(config.prune).items() if name not in later}
    depends_on_layout = cfg.multiples or cfg.divisors or cfg.latency_ms is not None
    layout = {"parallel.tp": config.parallel.tp} if depends_on_layout else {}
    return {"search": result_settings(cfg), "prune": prune} | layout


def search_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return the metrics that the search ranks by and the score stage does not measure, and what a profile lacks."""
    problems = profile_problems(config)
    for name, measured, chosen in (
        ("width", config.score.width, config.search.width),
        ("depth", config.score.depth, config.search.depth),
    ):
        if chosen is not None and chosen not in measured:
            names = [metric.name for metric in measured]
            problems.append(
                f"search.{name}={chosen.name} must be one of the metrics measured, {names}; add it to score.{name}."
            )
    if config.search.experts_by is ExpertMetric.reap:
        if models and not models[0].num_experts:
            problems.append(
                f"search.experts_by=reap ranks experts, which {models[0].family} has none of; leave it out."
            )
        if not any(metric.pair for metric in config.score.width):
            problems.append("search.experts_by=reap needs an activation metric in score.width; add l2_mean to it.")
    return problems


def run_search(run: Run, folder: Path) -> dict[str, Any]:
    """Search the candidates."""
    from compactlm_nemo.stages.candidate_search import search

    return search(run, folder)


STAGE = Stage(
    name="search",
    summary="scores and budgets -> `candidates.json`, best first",
    reads=("teacher", "tokens", "score"),
    writes="search",
    settings=search_settings,
    files=lambda config: (
        {} if (path := config.search.latency_profile) is None else {"search.latency_profile": Path(path)}
    ),
    problems=search_problems,
    run=run_search,
)
