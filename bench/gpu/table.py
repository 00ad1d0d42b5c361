"""Results as Markdown: a row for each figure, the errors, and one line for the card."""

from __future__ import annotations

from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    machine, run = result["machine"], result["run"]
    installed = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    lines = [f"{machine.get('card', 'unknown card')}; {installed}{'; dry run at toy size' if run['dry'] else ''}", ""]
    lines += ["| part | what | value | goal | |", "|---|---|---|---|---|"]
    for part, found in result["parts"].items():
        for row in found["figures"]:
            verdict = {None: "", True: "met", False: "**missed**"}[row["met"]]
            value = f"{shown(row['value'])} {row['unit']}".strip()
            lines.append(f"| {part} | {row['name']} | {value} | {row['goal']} | {verdict} |")
    lines += ["", *problems(result), summary(result)]
    return "\n".join(lines)


def shown(value: float | str) -> str:
    """Return a number with three figures or more."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def problems(result: dict[str, Any]) -> list[str]:
    """Return a line for each part or measurement that has an error, or was left out."""
    lines = []
    for part, found in result["parts"].items():
        if found["error"]:
            lines.append(f"- {part} {found['state']}: {found['error']}")
        lines += [f"- {part}, {name}: {error}" for name, error in found["details"].get("errors", {}).items()]
    return [*lines, ""] if lines else []


def summary(result: dict[str, Any]) -> str:
    """Return one line: the card, the seconds, the goals met and missed."""
    rows = [row for found in result["parts"].values() for row in found["figures"] if row["goal"]]
    words = [f"{row['name']} {shown(row['value'])} {row['unit']}".strip() for row in rows]
    words += [f"{sum(row['met'] for row in rows)} of {len(rows)} goals", f"{result['run']['seconds']:.0f} s"]
    return f"{result['machine'].get('card', 'unknown card')}: {'; '.join(words)}"
