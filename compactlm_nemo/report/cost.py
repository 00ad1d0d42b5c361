"""Tells what a run has cost so far: tokens, seconds and device-hours of each stage, from the manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import MANIFEST, read_manifest
from compactlm_nemo.report.tables import comparison_markdown

PARTS = ("rank/*", "round_*")
"""Where candidates and rounds keep artifacts of their own."""


def cost_rows(run_dir: Path, price_hour: float) -> list[dict[str, Any]]:
    """Return a row an artifact in order of time, one for candidates and rounds, and the sum.

    One that another run has made, and this one links to, has its cost there.

    Args:
        price_hour: Dollars of a device for an hour, 0 where it is not known.
    """
    stages = [folder for folder in run_dir.glob("*/") if folder.name != "report"]
    rows = [_row(name, [told], price_hour) for name, told in _costs(stages)]
    parts = [folder for part in PARTS for folder in run_dir.glob(f"{part}/*/")]
    if of_parts := [told for _, told in _costs(parts)]:
        rows.append(_row("candidates and rounds", of_parts, price_hour))
    if not rows:
        return []
    total: dict[str, Any] = {"artifact": "all"}
    for key in dict.fromkeys(key for row in rows for key in row if key not in ("artifact", "tokens", "devices")):
        total[key] = sum(row[key] for row in rows)
    return [*rows, total]


def cost_lines(run_dir: Path, price_hour: float) -> list[str]:
    """Return the report's lines; none of a run whose manifests tell no time."""
    rows = cost_rows(run_dir, price_hour)
    if not rows:
        return []
    told = [
        {
            "artifact": row["artifact"],
            "tokens": row.get("tokens"),
            "ranks": row.get("devices"),
            "seconds": f"{row['seconds']:,.1f}",
            "device-hours": f"{row['device_hours']:,.4g}",
            **({"dollars": f"{row['dollars']:,.2f}"} if "dollars" in row else {}),
        }
        for row in rows
    ]
    price = f" A device-hour costs ${price_hour:g} (cluster.price_hour)." if price_hour else ""
    return [
        "## Cost so far", "", comparison_markdown(told),
        "Seconds are those of the launch that made an artifact, of a training those of all its launches; device-hours "
        f"are seconds times ranks.{price}",
        "",
    ]  # fmt: skip


def _costs(folders: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Return artifact and cost of the folders that hold an artifact of their own, in order of time."""
    manifests = [
        (folder, read_manifest(folder))
        for folder in folders
        if (folder / MANIFEST).is_file() and not folder.is_symlink()
    ]
    manifests.sort(key=lambda each: (each[1]["time"], (each[0] / MANIFEST).stat().st_mtime_ns))
    return [(folder.name, _cost(folder, manifest)) for folder, manifest in manifests if manifest.get("cost")]


def _cost(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    results, cost = manifest["results"], manifest["cost"]
    seconds = max(cost["seconds"], results.get("training_seconds", 0.0))
    return {"seconds": seconds, "devices": cost["devices"], "tokens": _tokens(folder, results)}


def _tokens(folder: Path, results: dict[str, Any]) -> int | None:
    """Return the tokens that went through a stage: trained, scored, or written; those of a text once for each model."""
    measured = folder / "results.json"
    if measured.is_file():
        rows = json.loads(measured.read_text(encoding="utf-8"))
        is_text = {key for row in rows for key in row if f"loss_{key.removeprefix('tokens_')}" in row}
        return sum(row[key] for row in rows for key in is_text if key.startswith("tokens_"))
    tokens = results.get("tokens")
    return sum(tokens.values()) if isinstance(tokens, dict) else tokens


def _row(artifact: str, costs: list[dict[str, Any]], price_hour: float) -> dict[str, Any]:
    hours = sum(cost["seconds"] * cost["devices"] for cost in costs) / 3600
    tokens = [cost["tokens"] for cost in costs if cost["tokens"] is not None]
    row = {
        "artifact": artifact,
        "tokens": sum(tokens) if tokens else None,
        "devices": max(cost["devices"] for cost in costs),
        "seconds": sum(cost["seconds"] for cost in costs),
        "device_hours": hours,
    }
    return row | ({"dollars": hours * price_hour} if price_hour else {})
