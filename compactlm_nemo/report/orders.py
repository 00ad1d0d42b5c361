"""Compares the orders that loss and tasks give candidates, before and after their short distillation."""

from __future__ import annotations

from typing import Any

import torch

from compactlm_nemo.importance.agreement import spearman
from compactlm_nemo.report.figures import DISTILLED, PRUNED
from compactlm_nemo.report.search_plots import shape_label
from compactlm_nemo.report.tables import comparison_markdown


def orders(ranked: list[dict[str, Any]]) -> list[str]:
    """Return the report's lines about candidates that a task has ranked; none where the loss alone did.

    Args:
        ranked: Entries of `ranking.json`, best first.
    """
    tasks = list(ranked[0].get("tasks", {})) if ranked else []
    if not tasks:
        return []
    values = {"loss": ([entry["loss_before"] for entry in ranked], [entry["loss"] for entry in ranked])}
    for task in tasks:
        before, after = ([entry["tasks"][task][model] for entry in ranked] for model in (PRUNED, DISTILLED))
        values[task] = (before, after)
    rows = [
        {"candidate": entry["candidate"], "shape": shape_label(entry)}
        | {
            f"{name} {when}": f"{of_candidates[number]:.4f}"
            for name, pair in values.items()
            for when, of_candidates in zip(("before", "after"), pair, strict=True)
        }
        | {"score": f"{entry['score']:.4f}"}
        for number, entry in enumerate(ranked)
    ]
    text = [
        "Candidates by loss and by accuracy, before and after their short distillation; best first:",
        "",
        comparison_markdown(rows).rstrip(),
        "",
    ]
    if len(ranked) < 2:
        return text
    # A good candidate has a low loss and a high accuracy: of accuracies the fall is what is ranked.
    good = {
        name: values[name] if name == "loss" else tuple([-x for x in part] for part in values[name]) for name in values
    }
    agreement = [{"orders": f"{name}, before and after", "Spearman's rho": _rho(*good[name])} for name in good] + [
        {"orders": f"loss and {task}, {when}", "Spearman's rho": _rho(good["loss"][number], good[task][number])}
        for task in tasks
        for number, when in enumerate(("before", "after"))
    ]
    return [
        *text,
        "How far these orders agree (1 is the same order, -1 the reverse):",
        "",
        comparison_markdown(agreement).rstrip(),
        "",
    ]


def _rho(first: list[float], second: list[float]) -> str:
    return f"{spearman(torch.tensor(first), torch.tensor(second)):.2f}"
