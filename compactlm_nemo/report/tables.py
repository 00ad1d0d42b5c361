"""Turns rows of results into Markdown and terminal tables. A column is a key; columns are in order of first use."""

from __future__ import annotations

from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

MISSING = "–"


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _cell(value: Any) -> str:
    """Write a value: integers with thousands separators, floats with four significant digits, None as a dash."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _is_numeric(rows: list[dict[str, Any]], column: str) -> bool:
    values = [row[column] for row in rows if row.get(column) is not None]
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def comparison_markdown(rows: list[dict[str, Any]]) -> str:
    """Write a GitHub Markdown table that ends in a newline; numeric columns are right-aligned, no rows give no text."""
    if not rows:
        return ""

    def line(cells: list[str]) -> str:
        # A pipe or a line break inside a cell would end it.
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |\n"

    columns = _columns(rows)
    rule = ["---:" if _is_numeric(rows, column) else "---" for column in columns]
    body = [line([_cell(row.get(column)) for column in columns]) for row in rows]
    return line(columns) + line(rule) + "".join(body)


def rich_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Build a table for a terminal; text in cells is shown literally, never read as rich markup."""
    table = Table(title=escape(title), padding=0)
    columns = _columns(rows)
    for column in columns:
        # A heading may break over lines, a value must stay whole.
        widest = max((len(_cell(row.get(column))) for row in rows), default=0)
        justify: Literal["left", "right"] = "right" if _is_numeric(rows, column) else "left"
        table.add_column(escape(column), justify=justify, min_width=widest)
    for row in rows:
        table.add_row(*(escape(_cell(row.get(column))) for column in columns))
    return table
