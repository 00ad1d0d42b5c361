"""Writes the metrics of the evaluate stage as a table with their intervals, and as plots with a table each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from compactlm_nemo.report.drift_plots import BIAS_KINDS, plot_bias, plot_kl, plot_reliability
from compactlm_nemo.report.figures import DISTILLED, TEACHER, is_slice
from compactlm_nemo.report.tables import comparison_markdown

LARGEST_P = 0.05
"""Below it a difference from the teacher has a star."""


def quality_rows(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a metric; slices of a text (`loss/wiki/short`) have none."""
    return [
        {"metric": metric["metric"], "units": f"{metric['num_units']:,} {metric['units']}"}
        | {model: _cell(value, metric["against_teacher"].get(model)) for model, value in metric["models"].items()}
        for metric in metrics
        if not is_slice(metric["metric"])
    ]


def quality_lines(run_dir: Path, folder: Path, figures: dict[str, Figure]) -> list[str]:
    """Return the report's lines about `quality.json`; none where a run was evaluated before there was one.

    Args:
        folder: Gets the plots.
        figures: Gets them too, by file name.
    """
    path = run_dir / "evaluate" / "quality.json"
    if not path.is_file():
        return []
    quality = json.loads(path.read_text())
    rows, details = quality_rows(quality["metrics"]), quality.get("details", {})
    # A column for every model, the teacher first, though not every metric has them all.
    models = dict.fromkeys(["metric", "units", "teacher", *(key for row in rows for key in row)])
    table = comparison_markdown([{key: row.get(key) for key in models} for row in rows])
    legend = f"Value and 95 % interval; * where it differs from the teacher's with p < {LARGEST_P} (docs/quality.md):"
    return [
        *["## Quality", "", legend, "", table],
        *_kl(details.get("heldout", {}), folder, figures),
        *_reliability(details, folder, figures),
        *_bias(quality["metrics"], folder, figures),
    ]


def _kl(texts: dict[str, Any], folder: Path, figures: dict[str, Figure]) -> list[str]:
    if not texts:
        return []
    figures["kl.png"] = plot_kl(texts, folder / "kl.png")
    rows = [
        {"text": text, where: f"{each[first]:,} to {each[last]:,}", "tokens": each["tokens"]}
        | {f"KL, {model}": f"{value:.4f}" for model, value in each["kl"].items()}
        for where, kind, first, last in (
            ("ranks", "by_frequency", "from_rank", "to_rank"), ("places", "by_position", "from", "to"),
        )
        for text, found in texts.items()
        for each in found[kind]
    ]  # fmt: skip
    tables = [comparison_markdown([row for row in rows if where in row]) for where in ("ranks", "places")]
    return [
        "Where the student departs from its teacher: KL by how frequent the true token is in the training text, and by "
        "its place in the window:",
        "",
        "![KL from the teacher by frequency of the true token and by place in the window](kl.png)",
        "",
        *tables,
    ]


def _reliability(details: dict[str, Any], folder: Path, figures: dict[str, Figure]) -> list[str]:
    """Plot a diagram for each set of questions."""
    lines: list[str] = []
    sets = {name.partition("/")[2]: found for name, found in details.items() if name.startswith("choices/")}
    for number, (name, found) in enumerate(sets.items(), start=1):
        file, bins = f"reliability_{number}.png", found["reliability"]
        figures[file] = plot_reliability(bins, name, folder / file)
        by_bin: dict[str, dict[str, Any]] = {}
        for model in (TEACHER, DISTILLED):
            for each in bins.get(model, []):
                row = by_bin.setdefault(f"{each['low']:.2f} to {each['high']:.2f}", {})
                row[model] = f"{each['accuracy']:.2f} of {each['questions']:,}, sure {each['confidence']:.2f}"
        rows = [
            {"confidence": label} | {m: row.get(m) for m in (TEACHER, DISTILLED)}
            for label, row in sorted(by_bin.items())
        ]
        lines += [
            f"How often a model is right on {name} when it is so sure (accuracy, questions, mean confidence):",
            "",
            f"![Accuracy over confidence on {name}, teacher and distilled student, and the questions in a bin]({file})",
            "",
            comparison_markdown(rows),
        ]
    return lines


def _bias(metrics: list[dict[str, Any]], folder: Path, figures: dict[str, Figure]) -> list[str]:
    """Plot how the bias moves; its numbers stand in the table of metrics."""
    found = [each for each in metrics if each["metric"].partition("/")[0] in [f"bias_{kind}" for kind in BIAS_KINDS]]
    if not found:
        return []
    figures["bias.png"] = plot_bias(found, folder / "bias.png")
    moves = [
        f"{each['metric']} from {each['models'][TEACHER]['value']:.3f} to {each['models'][DISTILLED]['value']:.3f}"
        for each in found
        if {TEACHER, DISTILLED} <= each["models"].keys()
    ]
    text = f"Bias of teacher and distilled student with 95 % intervals: {', '.join(moves) or 'no score of both'}"
    return ["How the bias moves from the teacher to the student:", "", f"![{text}](bias.png)", ""]


def _cell(value: dict[str, float | None], difference: dict[str, float | None] | None) -> str:
    p = difference["p"] if difference else None
    star = "*" if p is not None and p < LARGEST_P else ""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.4f}{star}"
    return f"{value['value']:.4f}{star} ({value['low']:.4f} to {value['high']:.4f})"
