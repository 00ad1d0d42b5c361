"""Tables against text written by hand; plots are read back as pixels."""

import io

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from compactlm_nemo.errors import DataError
from compactlm_nemo.report.plots import plot_importance, plot_loss_curve, plot_sizes
from compactlm_nemo.report.tables import comparison_markdown, rich_table

ROWS = [
    {"model": "teacher | base", "params": 134515008, "loss": 2.851234, "tied": True},
    {"model": "a\nb [bold]", "params": None, "loss": 12345.6, "note": "cut"},
]


def test_markdown_table_by_hand():
    assert comparison_markdown(ROWS) == (
        "| model | params | loss | tied | note |\n"
        "| --- | ---: | ---: | --- | --- |\n"
        "| teacher \\| base | 134,515,008 | 2.851 | yes | – |\n"
        "| a b [bold] | – | 1.235e+04 | – | cut |\n"
    )
    assert comparison_markdown([]) == ""


def test_rich_table_shows_text_as_it_is():
    out = io.StringIO()
    Console(file=out, width=120).print(rich_table("Sizes [x]", ROWS))
    for text in ("Sizes [x]", "teacher | base", "134,515,008", "[bold]", "2.851"):
        assert text in out.getvalue()


def colours(path, name: str) -> int:
    """Pixels close to a colour of matplotlib's default cycle."""
    want = {"blue": (31, 119, 180), "orange": (255, 127, 14)}[name]
    image = imread(path)[..., :3]
    return int((abs(image * 255 - want).max(-1) < 3).sum())


def test_loss_curve_draws_student_and_teacher(tmp_path):
    lines = [
        {"step": i, "train/kd_logit_nats": 2 / i, "train/lm_loss_nats": 3 + 1 / i, "train/teacher_lm_loss_nats": 2.9}
        for i in range(1, 60)
    ]
    path = tmp_path / "new" / "loss.png"
    plot_loss_curve([*lines, {"eval/loss": 1.0}], path)
    assert colours(path, "blue") > 300 and colours(path, "orange") > 300
    # A loss of exactly 0 has no place on a log axis, yet must be seen: the legend alone is about 40 pixels.
    plot_loss_curve([{"step": i, "train/kd_logit_nats": 0.0} for i in range(60)], tmp_path / "one.png")
    assert colours(tmp_path / "one.png", "blue") > 300
    assert colours(tmp_path / "one.png", "orange") == 0
    with pytest.raises(DataError, match="no metric line"):
        plot_loss_curve([{"step": 1}], path)


def test_importance_fills_its_panels(tmp_path):
    scores = {"hidden": torch.rand(64) + 0.1, "depth.bi": torch.rand(6)}
    for i in range(6):
        scores |= {f"layers.{i}.mlp": torch.rand(96).exp() * (i + 1), f"layers.{i}.heads": torch.rand(8)}
    scores["layers.0.heads"] = torch.zeros(8)  # a dead layer divides by nothing
    plot_importance(scores, tmp_path / "importance.png")
    image = imread(tmp_path / "importance.png")
    assert len(set(map(tuple, (image[::4, ::4, :3].reshape(-1, 3) * 255).astype(int).tolist()))) > 50
    assert colours(tmp_path / "importance.png", "blue") > 5000  # six depth bars
    with pytest.raises(DataError, match="no layers.0.heads"):
        plot_importance({"hidden": torch.ones(4)}, tmp_path / "x.png")


def test_sizes_has_one_colour_a_text(tmp_path):
    rows = [
        {"model": name, "params": params, "lm_loss_nats": loss + shift, "text": text}
        for text, shift in (("wiki", 0.0), ("news", 0.6))
        for name, params, loss in (("teacher", 134515008, 2.85), ("pruned", 90000000, 5.2), ("student", 90000000, 3.3))
    ]
    plot_sizes(rows, tmp_path / "two.png")
    plot_sizes(rows[:3], tmp_path / "one.png")
    assert min(colours(tmp_path / "two.png", name) for name in ("blue", "orange")) > 100
    assert colours(tmp_path / "one.png", "orange") == 0
    with pytest.raises(DataError, match="no result"):
        plot_sizes([], tmp_path / "none.png")


def test_values_stay_whole_on_a_narrow_terminal():
    row = {"model": "distilled", "parameters": 134515008, "LM loss wiki": "2.9423", "LM loss django": "3.1837"}
    row |= {"tokens trained": 102400, "forward tokens/s": 1082}
    console = Console(width=80, file=io.StringIO())
    console.print(rich_table("run", [row]))
    for value in ("distilled", "134,515,008", "2.9423", "3.1837", "102,400", "1,082"):
        assert value in console.file.getvalue()
