"""Writes the report of a run: one table, the plots, and how the numbers came about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from compactlm_nemo.artifacts import atomic_write_text, read_manifest
from compactlm_nemo.config.gate import LimitConfig
from compactlm_nemo.config.score import BLOCK_METRICS, DepthMetric, ExpertMetric, WidthMetric
from compactlm_nemo.importance.scores import Scores, load_scores
from compactlm_nemo.report.cost import cost_lines
from compactlm_nemo.report.gate import Verdict, verdicts_of
from compactlm_nemo.report.importance_plots import plot_agreement, plot_depth, plot_importance
from compactlm_nemo.report.orders import orders
from compactlm_nemo.report.page import page
from compactlm_nemo.report.plots import plot_loss_curve, plot_sizes, tokens_curve
from compactlm_nemo.report.quality import quality_lines
from compactlm_nemo.report.search_plots import plot_pareto, plot_prediction, plot_rank_curves, shape_label
from compactlm_nemo.report.speed import speed_lines
from compactlm_nemo.report.tables import comparison_markdown, print_table
from compactlm_nemo.training.saving_time import saving_text
from compactlm_nemo.training.tracker import LOSS, METRICS

Figures = dict[str, Figure]
"""File name in the Markdown -> the picture."""

SHORT_TABLE_LAYERS = 16
"""The report has a table of the layers' scores for models of at most this many layers; a longer one is hard to read."""


def _results(run_dir: Path) -> list[dict[str, Any]]:
    """Read the results of the evaluate stage, a row a model."""
    rows: list[dict[str, Any]] = json.loads((run_dir / "evaluate" / "results.json").read_text())
    return rows


def table_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return one row a model, with rounded figures."""
    table = []
    for row in _results(run_dir):
        losses = {key: value for key, value in row.items() if key.startswith("loss_")}
        tasks = {key: value for key, value in row.items() if key.startswith("task_")}
        table.append(
            {
                "model": row["model"],
                "parameters": row["params"],
                **{f"LM loss {key.removeprefix('loss_')}": f"{value:.4f}" for key, value in losses.items()},
                **{key.removeprefix("task_"): f"{value:.4f}" for key, value in tasks.items()},
                "tokens trained": row["tokens_trained"],
                "forward tokens/s": round(row["forward_tokens_per_second"]),
            }
        )
    return table


def write_report(
    run_dir: Path,
    folder: Path,
    *,
    limits: Mapping[str, LimitConfig] | None = None,
    profile: Path | None = None,
    price_hour: float = 0.0,
) -> None:
    """Write report.md, report.html and the plots, from what the other stages left in the run's folder.

    Args:
        limits: Of the gate; the report begins with its verdict and ends with that on each limit.
        profile: Folder of the profile stage, None of a run without one.
        price_hour: Of a device, in dollars; 0 is not known.
    """
    figures: Figures = {}
    losses = _heldout_losses(run_dir)
    figures["loss.png"] = plot_loss_curve(_metrics(run_dir / "distill"), folder / "loss.png", losses)
    points = [
        {"model": row["model"], "params": row["params"], "lm_loss_nats": value, "text": key.removeprefix("loss_")}
        for row in _results(run_dir)
        for key, value in row.items()
        if key.startswith("loss_")
    ]
    figures["sizes.png"] = plot_sizes(points, folder / "sizes.png")
    recovered = [f"- {name}: {_percent(share)}" for name, share in _recovered(run_dir).items()]
    shape = read_manifest(run_dir / "student")["results"]["shape"]
    trained = read_manifest(run_dir / "distill")["results"]
    verdicts = verdicts_of(limits, run_dir) if limits else []
    text = [
        f"# {run_dir.name}",
        "",
        *([f"Gate: {_outcome(verdicts)}", ""] if verdicts else []),
        comparison_markdown(table_rows(run_dir)),
        "",
        "Share of the loss gap between teacher and pruned model that distillation closed:",
        "",
        *recovered,
        "",
        *quality_lines(run_dir, folder, figures),
        "Student: {layers} layers, hidden {hidden}, MLP {ffn}, heads {heads}.".format(**shape),
        "",
        f"In distillation, {saving_text(trained['saving_seconds'], trained['training_seconds'])}.",
        "",
        "![Loss over tokens](loss.png)",
        "![Loss against size](sizes.png)",
        "",
        *cost_lines(run_dir, price_hour),
        *(speed_lines(json.loads((profile / "profile.json").read_text())) if profile else []),
        *_search(run_dir, folder, figures),
        *_importance(run_dir, folder, figures),
        *_gate(verdicts),
    ]
    markdown = "\n".join(text) + "\n"
    atomic_write_text(folder / "report.md", markdown)
    atomic_write_text(folder / "report.html", page(markdown, figures))


def _gate(verdicts: list[Verdict]) -> list[str]:
    """Return the report's lines about the limits of the gate."""
    if not verdicts:
        return []
    return ["", "## Gate", "", comparison_markdown([each.row() for each in verdicts]).rstrip(), "", _outcome(verdicts)]


def _outcome(verdicts: list[Verdict]) -> str:
    failed = sum(not each.passed for each in verdicts)
    return f"**FAIL**: {failed} of {len(verdicts)} limits are not kept" if failed else "**PASS**: all limits are kept"


def _search(run_dir: Path, folder: Path, figures: Figures) -> list[str]:
    """Plot the candidates that were built or trained, and return the report's lines about these plots."""
    candidates = json.loads((run_dir / "search" / "candidates.json").read_text())
    ranking = run_dir / "rank" / "ranking.json"
    ranked = json.loads(ranking.read_text()) if ranking.is_file() else []
    text: list[str] = []
    if ranked or any("zero_shot_loss" in candidate for candidate in candidates):
        figures["pareto.png"] = plot_pareto(ranked or candidates, folder / "pareto.png")
        text += ["What candidates lose for their size:", "", "![Loss against cost of candidates](pareto.png)", ""]
    if sum("zero_shot_loss" in candidate and "predicted_loss" in candidate for candidate in candidates) > 1:
        figures["prediction.png"] = plot_prediction(candidates, folder / "prediction.png")
        text += ["Predicted and measured loss:", "", "![Prediction](prediction.png)", ""]
    if ranked:
        curves = {int(path.name): _loss_curve(path) for path in sorted(ranking.parent.glob("[0-9]*"))}
        curves = {index: curve for index, curve in curves.items() if curve}
        labels = {index: shape_label(candidates[index]) for index in curves}
        figures["ranks.png"] = plot_rank_curves(curves, labels, folder / "ranks.png")
        text += ["How the candidates fared while they were trained:", "", "![Ranks over tokens](ranks.png)", ""]
    text += orders(ranked)
    return ["## Candidates", "", *text] if text else []


def _loss_curve(candidate: Path) -> list[tuple[float, float]]:
    """Read the distillation loss of a candidate over tokens; empty when the training of the candidate has not begun."""
    folders = (candidate / "distill", candidate / "progress" / "distill")
    folder = next((path for path in folders if (path / METRICS).is_file()), None)
    return tokens_curve(_metrics(folder), LOSS) if folder else []


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a folder's metrics file."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _heldout_losses(run_dir: Path) -> dict[str, dict[str, float]]:
    """Return held-out text -> model -> LM loss, from the evaluate stage."""
    losses: dict[str, dict[str, float]] = {}
    for row in _results(run_dir):
        for key, value in row.items():
            if key.startswith("loss_"):
                losses.setdefault(key.removeprefix("loss_"), {})[row["model"]] = value
    return losses


def _importance(run_dir: Path, folder: Path, figures: Figures) -> list[str]:
    """Plot the scores, and return the report's lines about these plots."""
    scores = load_scores(run_dir / "score")
    width, depth, experts = _chosen_metrics(run_dir, scores)
    figures["importance.png"] = plot_importance(scores.ranking(width, depth, experts), folder / "importance.png")
    figures["depth.png"] = plot_depth(scores, folder / "depth.png")
    text = [
        "## Importance",
        "",
        f"The cut ranks units by `{width.name}` and layers by `{depth.name}`.",
        "",
        f"What `{width.name}` gives the units of each layer:",
        "",
        "![Importance of units](importance.png)",
        "",
    ]
    if len(scores.width_metrics) > 1:
        figures["agreement.png"] = plot_agreement(scores, folder / "agreement.png")
        text += [
            "How far the width metrics rank the same units alike (Kendall's tau, mean over layers; 1 is the same "
            "order, 0 is none in common):",
            "",
            "![Agreement of the width metrics](agreement.png)",
            "",
        ]
    text += ["What each depth metric gives the layers:", "", "![Importance of layers](depth.png)"]
    if table := comparison_markdown(depth_rows(scores)):
        text += ["", table.rstrip()]
    return text


def _chosen_metrics(run_dir: Path, scores: Scores) -> tuple[WidthMetric, DepthMetric, ExpertMetric]:
    """Return the metrics that the search stage ranked by: those of its settings, else the first of the scores."""
    settings = read_manifest(run_dir / "search")["settings"]
    width, depth = settings.get("search.width"), settings.get("search.depth")
    experts = ExpertMetric[settings.get("search.experts_by", ExpertMetric.width.name)]
    return WidthMetric[width or scores.width_metrics[0]], DepthMetric[depth or scores.depth_metrics[0]], experts


def _layer_metrics(scores: Scores) -> list[str]:
    """List the depth metrics that give each layer a number."""
    return [name for name in scores.depth_metrics if DepthMetric[name] not in BLOCK_METRICS]


def depth_rows(scores: Scores) -> list[dict[str, Any]]:
    """Return one row a layer with a score by each metric of layers; no rows when the model has too many layers."""
    columns = {metric: scores.depth(metric).tolist() for metric in _layer_metrics(scores)}
    num_layers = max(map(len, columns.values()), default=0)
    if num_layers > SHORT_TABLE_LAYERS:
        return []
    return [
        {"layer": i} | {metric: values[i] if isfinite(values[i]) else None for metric, values in columns.items()}
        for i in range(num_layers)
    ]


def _recovered(run_dir: Path) -> dict[str, float | None]:
    recovered: dict[str, float | None] = read_manifest(run_dir / "evaluate")["results"]["recovered"]
    return recovered


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def show(run_dir: Path, console: Console) -> None:
    """Print the closing table and where the results are."""
    print_table(console, run_dir.name, table_rows(run_dir))
    for name, share in _recovered(run_dir).items():
        console.print(f"loss gap closed on {name}: {_percent(share)}")
    console.print(f"Hugging Face folder: {read_manifest(run_dir / 'export')['results']['folder']}", soft_wrap=True)
    console.print(f"report: {run_dir / 'report' / 'report.html'} (and report.md)", soft_wrap=True)
