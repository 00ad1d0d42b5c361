"""Tables in terminals: one row below the other, or side by side where only that is narrow enough; nothing is cut."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from compactlm_nemo.report.tables import print_comparison, print_table, turned

ROWS: list[dict[str, Any]] = [
    {"run": "runs/a", "forward tokens/s": 1082} | {f"loss/text_{i}": f"{i}.25 [1, 9]" for i in range(6)},
    {"run": "runs/b", "forward tokens/s": None} | {f"loss/text_{i}": f"{i}.75 [1, 9]" for i in range(6)},
]


def printed(width: int, rows: list[dict[str, Any]] = ROWS) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    print_comparison(console, "Runs", rows, "run")
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("width", "beside"), [(200, False), (60, True), (20, True)])
def test_the_layout_that_fits_is_taken_and_nothing_is_lost(width: int, beside: bool) -> None:
    lines = printed(width)
    text = "\n".join(lines)
    for word in ("runs/a", "runs/b", "forward", "tokens/s", "1,082", "loss/text_5", "0.25 [1, 9]", "5.75 [1, 9]"):
        assert word in text
    assert "…" not in text
    assert any("runs/a" in line and "runs/b" in line for line in lines) == beside
    if width >= 60:
        assert max(map(len, lines)) <= width


def test_many_runs_of_few_numbers_stay_below_each_other() -> None:
    lines = printed(40, [{"run": f"runs/{i}", "loss": 1.5 + i} for i in range(12)])
    assert not any("runs/1" in line and "runs/2" in line for line in lines)


def test_turned_rows_are_the_same_cells() -> None:
    assert turned([{"run": "a", "x": 1, "y": None}, {"run": "b", "z": 2}], "run") == [
        {"": "x", "a": 1, "b": None}, {"": "y", "a": None, "b": None}, {"": "z", "a": None, "b": 2},
    ]  # fmt: skip


def test_a_table_wider_than_the_terminal_breaks_and_is_not_cut() -> None:
    console = Console(width=30, file=io.StringIO())
    print_table(
        console, "Gate", [{"limit": "loss", "must be": "at most 0.2, to the interval's end", "verdict": "FAIL"}]
    )
    assert "FAIL" in console.file.getvalue()  # type: ignore[attr-defined]
