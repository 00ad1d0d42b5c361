"""Turns rows of results into Markdown and terminal tables. A column is a key; columns are in order of first use."""

from __future__ import annotations

from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

MISSING = "–"
_ANY_WIDTH = 10**6


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
        # A heading may break between its words, a value must stay whole.
        widest = max(map(len, [*column.split(), *(_cell(row.get(column)) for row in rows)]), default=0)
        justify: Literal["left", "right"] = "right" if _is_numeric(rows, column) else "left"
        table.add_column(escape(column), justify=justify, min_width=widest)
    for row in rows:
        table.add_row(*(escape(_cell(row.get(column))) for column in columns))
    return table


def print_table(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; where it is wider than the terminal its lines break, and nothing is lost."""
    console.print(rich_table(title, rows), crop=False)


def print_comparison(console: Console, title: str, rows: list[dict[str, Any]], key: str) -> None:
    """Print rows that a column tells apart, one below the other; side by side where only that is narrow enough.

    Of two tables that are both wider than the terminal the narrower is printed.
    """
    below = rich_table(title, rows)
    if _width(console, below) > console.width:
        beside = rich_table(title, turned(rows, key))
        below = min(below, beside, key=lambda table: _width(console, table))
    console.print(below, crop=False)


def turned(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return a row for each column but `key`, whose values head the new columns."""
    columns = [column for column in _columns(rows) if column != key]
    return [{"": column} | {str(row[key]): row.get(column) for row in rows} for column in columns]


def _width(console: Console, table: Table) -> int:
    """Return the columns of the terminal that a table needs, however many there are."""
    return Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).minimum
