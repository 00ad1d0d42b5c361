"""Plots of what a student does beside its teacher, read back from their panels; the report says the same as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compactlm_nemo.errors import DataError
from compactlm_nemo.report.drift_plots import plot_bias, plot_kl, plot_reliability
from compactlm_nemo.report.page import page
from compactlm_nemo.report.quality import quality_lines


def bins(*rows: tuple[int, int, float, float]) -> list[dict[str, float]]:
    """Bins (number, questions, confidence, accuracy) as `details` has them."""
    return [
        {"low": n / 15, "high": (n + 1) / 15, "questions": count, "confidence": sure, "accuracy": right}
        for n, count, sure, right in rows
    ]


RELIABILITY = {
    "teacher": bins((4, 10, 0.31, 0.3), (9, 30, 0.62, 0.7), (14, 60, 0.97, 0.9)),
    "pruned": bins((3, 100, 0.25, 0.2)),
    "distilled": bins((3, 20, 0.25, 0.35), (9, 50, 0.63, 0.5), (14, 30, 0.96, 0.7)),
}


def score(value: float, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def bias(name: str, teacher: dict[str, Any] | None, distilled: dict[str, Any] | None) -> dict[str, Any]:
    models = {"teacher": teacher, "distilled": distilled}
    return {
        "metric": name, "units": "templates", "num_units": 9, "is_better": None, "against_teacher": {},
        "models": {model: found for model, found in models.items() if found},
    }  # fmt: skip


BIAS = [
    bias("bias_ambiguous/age", score(0.1, 0.05, 0.16), score(0.3, 0.2, 0.42)),
    bias("bias_disambiguated/age", score(-0.2, -0.4, 0.1), score(0.05, -0.1, 0.2)),
    bias("bias_ambiguous/ses", score(0.0, None, None), score(-0.1, None, None)),
    bias("bias_disambiguated/ses", None, score(0.5, 0.3, 0.7)),
]
FREQUENCY = [
    {"from_rank": first, "to_rank": last, "tokens": 50, "kl": {"pruned": 1.2 * kl, "distilled": kl}}
    for first, last, kl in ((1, 4, 0.05), (5, 45, 0.1), (46, 900, 0.2), (901, 40000, 0.6))
]
POSITION = [
    {"from": 32 * i, "to": 32 * i + 31, "tokens": 40, "kl": {"pruned": 1.5 - 0.1 * i, "distilled": 0.6 - 0.05 * i}}
    for i in range(4)
]
HELDOUT = {text: {"by_frequency": FREQUENCY, "by_position": POSITION} for text in ("wiki", "news")}


def test_the_diagram_has_accuracy_confidence_and_questions_of_each_bin(tmp_path: Path) -> None:
    figure = plot_reliability(RELIABILITY, "science", tmp_path / "r.png")
    teacher, distilled, teacher_counts, distilled_counts = figure.axes
    assert [axes.get_title() for axes in (teacher, distilled)] == ["teacher on science", "distilled on science"]
    for upper, lower, model in ((teacher, teacher_counts, "teacher"), (distilled, distilled_counts, "distilled")):
        found = RELIABILITY[model]
        bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in upper.patches]
        want = [(each["low"], 1 / 15, each["accuracy"]) for each in found]
        assert bars == [pytest.approx(each) for each in want]
        assert [bar.get_height() for bar in lower.patches] == [each["questions"] for each in found]
        (marks,) = (line for line in upper.lines if line.get_marker() == "o")
        assert list(marks.get_xdata()) == [each["confidence"] for each in found]
        assert list(marks.get_ydata()) == [each["accuracy"] for each in found]
        (diagonal,) = (line for line in upper.lines if line.get_linestyle() == "--")
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    assert (tmp_path / "r.png").stat().st_size > 5000
    with pytest.raises(DataError, match="no model has answered science"):
        plot_reliability({}, "science", tmp_path / "none.png")


def _marks(axes: Axes) -> list[float]:
    return [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]


def _intervals(axes: Axes) -> list[list[float]]:
    return [
        list(line.get_xdata()) for line in axes.lines if line.get_marker() == "None" and line.get_linestyle() == "-"
    ]


def test_the_bias_goes_from_the_teacher_to_the_student_with_intervals(tmp_path: Path) -> None:
    ambiguous, disambiguated = plot_bias(BIAS, tmp_path / "b.png").axes
    assert _marks(ambiguous) == [0.1, 0.3, 0.0, -0.1] and _intervals(ambiguous) == [[0.05, 0.16], [0.2, 0.42]]
    assert _marks(disambiguated) == [-0.2, 0.05, 0.5]
    assert _intervals(disambiguated) == [[-0.4, 0.1], [-0.1, 0.2], [0.3, 0.7]]
    assert [text.get_text() for text in ambiguous.get_yticklabels()] == ["age", "ses"]
    # An arrow where both have a score.
    assert [len(axes.texts) for axes in (ambiguous, disambiguated)] == [2, 1]
    with pytest.raises(DataError, match=r"evaluate\.bias"):
        plot_bias([], tmp_path / "none.png")


def test_the_kl_stands_at_the_middle_of_each_bin(tmp_path: Path) -> None:
    left, right = plot_kl(HELDOUT, tmp_path / "k.png").axes
    assert left.get_xscale() == "log"
    pruned, distilled, *others = left.lines
    assert (pruned.get_linestyle(), distilled.get_linestyle(), len(others)) == ("--", "-", 2)
    assert list(distilled.get_xdata()) == [2, 15, pytest.approx((46 * 900) ** 0.5), pytest.approx((901 * 40000) ** 0.5)]
    assert list(distilled.get_ydata()) == [0.05, 0.1, 0.2, 0.6]
    assert list(right.lines[0].get_xdata()) == [15.5, 47.5, 79.5, 111.5]
    assert list(right.lines[0].get_ydata()) == [1.5, 1.4, 1.3, pytest.approx(1.2)]
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "wiki, pruned", "wiki, distilled", "news, pruned", "news, distilled"
    ]  # fmt: skip
    with pytest.raises(DataError, match="no held-out text"):
        plot_kl({}, tmp_path / "none.png")


def test_the_report_has_each_plot_with_its_numbers_as_text(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    details = {"heldout": HELDOUT, "choices/science": {"reliability": RELIABILITY}, "bias/age": {}}
    quality = {"metrics": BIAS, "details": details}
    (tmp_path / "evaluate" / "quality.json").write_text(json.dumps(quality))
    figures: dict[str, Figure] = {}
    text = "\n".join(["# a run", "", *quality_lines(tmp_path, tmp_path / "report", figures)])
    assert list(figures) == ["kl.png", "reliability_1.png", "bias.png"]
    assert all((tmp_path / "report" / name).stat().st_size > 5000 for name in figures)
    assert "| wiki | 901 to 40,000 | 50 | 0.7200 | 0.6000 |" in text and "| news | 32 to 63 | 40 |" in text
    assert "| 0.60 to 0.67 | 0.70 of 30, sure 0.62 | 0.50 of 50, sure 0.63 |" in text
    assert "| 0.20 to 0.27 | – | 0.35 of 20, sure 0.25 |" in text
    assert "bias_ambiguous/age from 0.100 to 0.300, bias_disambiguated/age from -0.200 to 0.050" in text
    html = page(text, figures)
    assert html.count("<figure>") == html.count("</svg>") == 3 and "<img" not in html
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert captions == [
        "KL from the teacher by frequency of the true token and by place in the window",
        "Accuracy over confidence on science, teacher and distilled student, and the questions in a bin",
        "Bias of teacher and distilled student with 95 % intervals: bias_ambiguous/age from 0.100 to 0.300, "
        "bias_disambiguated/age from -0.200 to 0.050, bias_ambiguous/ses from 0.000 to -0.100",
    ]


def test_a_run_without_questions_has_the_kl_alone(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "quality.json").write_text(json.dumps({"metrics": [], "details": {"heldout": HELDOUT}}))
    figures: dict[str, Figure] = {}
    quality_lines(tmp_path, tmp_path / "report", figures)
    assert list(figures) == ["kl.png"]
