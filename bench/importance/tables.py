"""The measurement as Markdown tables."""

from __future__ import annotations

from typing import Any

MIB = 2**20


def tables(result: dict[str, Any]) -> str:
    """Cost of scoring, then agreement of the scores."""
    return "\n".join([_heading(result), "", *_costs(result), "", *_agreement(result)])


def _heading(result: dict[str, Any]) -> str:
    run, machine = result["run"], result["machine"]
    return (
        f"{result['model']}, {run['samples']} samples of {run['sequence_length']} tokens in micro-batches of "
        f"{run['micro_batch']}, {run['precision']}, {run['repeats']} repeats; {machine['processor']}, "
        f"{machine['threads']} threads, torch {machine['torch']}."
    )


def _costs(result: dict[str, Any]) -> list[str]:
    lines = ["| pass | seconds | time / own bare forward (range) | peak memory over bare |", "|---|---|---|---|"]
    for group in result["groups"]:
        bare = group["bare"]
        peak = f"({_mib(bare.get('peak_bytes'))})"
        lines.append(f"| **{group['label']}**: bare forward | {bare['seconds']['median']:.2f} | 1 | {peak} |")
        for name, row in group["scored"].items():
            ratio = "{median:.3f} ({min:.3f}–{max:.3f})".format(**row["ratio"])
            extra = _mib(row.get("extra_peak_bytes"), "+")
            lines.append(f"| {name} | {row['seconds']['median']:.2f} | {ratio} | {extra} |")
    return lines


def _mib(num_bytes: int | None, sign: str = "") -> str:
    return "not measured" if num_bytes is None else f"{num_bytes / MIB:{sign}.1f} MiB"


def _agreement(result: dict[str, Any]) -> list[str]:
    lines = [
        "| scores against Model-Optimizer's | vectors | Spearman, mean | least | largest relative difference |",
        "|---|---|---|---|---|",
    ]
    for axis, row in result["agreement"].items():
        lines.append(f"| {axis} | {row['vectors']} | {row['mean']:.4f} | {row['min']:.4f} | {row['gap']:.1e} |")
    return lines
