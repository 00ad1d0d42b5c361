"""Tables against text written by hand; plots are read back as pixels and as the numbers their panels hold."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from compactlm_nemo.artifacts import write_manifest
from compactlm_nemo.errors import CheckpointError, DataError
from compactlm_nemo.importance.scores import FILE, Scores, save_scores
from compactlm_nemo.report.importance_plots import plot_agreement, plot_depth, plot_importance
from compactlm_nemo.report.markdown import SHORT_TABLE_LAYERS, depth_rows, write_report
from compactlm_nemo.report.plots import plot_loss_curve, plot_sizes, short_number, tokens_curve
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


def training_lines(steps: range, tokens: float = 1000.0) -> list[dict]:
    """Lines of metrics.jsonl: the losses of the student fall, the loss of the teacher is 2.9."""
    return [
        {
            "step": i, "train/tokens": tokens, "train/loss": 2 / (i + 1), "train/lm_loss_nats": 3 + 1 / (i + 1),
            "train/teacher_lm_loss_nats": 2.9,
        }
        for i in steps
    ]  # fmt: skip


def tick_texts(figure: Figure, scale) -> list[str]:
    """The labels of the ticks that one sees: those within the axis."""
    figure.canvas.draw()
    low, high = sorted(scale.get_view_interval())
    labels = zip(scale.get_majorticklocs(), scale.get_ticklabels(), strict=True)
    return [label.get_text() for value, label in labels if low <= value <= high]


def test_tokens_of_steps_without_a_line_count():
    # Every third of 9 steps of 1,000 tokens has a line; the first is step 2, so 2,000 tokens came before its update.
    lines = [{"step": i, "train/tokens": 1000.0, "train/loss": float(i), "eval/loss": float(i)} for i in (2, 5, 8)]
    assert tokens_curve(lines, "train/loss") == [(2000, 2.0), (5000, 5.0), (8000, 8.0)]
    assert tokens_curve(lines, "eval/loss") == [(3000, 2.0), (6000, 5.0), (9000, 8.0)]
    # Global batches of other sizes, a value that was not finite, and lines of something else.
    others = [{"step": 0, "train/tokens": 10.0, "train/loss": 1.0}, {"eval/loss": 7.0}, {"step": 1, "train/loss": 2.0}]
    others += [
        {"step": 2, "train/tokens": 30.0, "train/loss": None},
        {"step": 3, "train/tokens": 5.0, "train/loss": 4.0},
    ]
    assert tokens_curve(others, "train/loss") == [(0, 1.0), (10 + 2 * 30, 4.0)]


def test_numbers_at_ticks():
    assert list(map(short_number, (0, 0.5, 500, 20_000, 1_500_000, 94e9, 2e12))) == [
        "0", "0.5", "500", "20k", "1.5M", "94B", "2T"
    ]  # fmt: skip


def test_loss_curve_shows_both_models_over_tokens_with_units(tmp_path):
    figure = plot_loss_curve([*training_lines(range(60)), {"eval/loss": 1.0}], tmp_path / "new" / "loss.png")
    found = panels(figure)
    assert set(found) == {"LM loss", "Distillation loss"}
    left, right = found["LM loss"], found["Distillation loss"]
    for axes in (left, right):
        assert axes.get_xlabel() == "tokens trained"
        assert tick_texts(figure, axes.xaxis) == ["0", "10k", "20k", "30k", "40k", "50k", "60k"]
        labels = tick_texts(figure, axes.yaxis)
        assert len(labels) >= 4 and all(labels)
    assert left.get_ylabel() == "nats per token" and right.get_ylabel() == "weighted sum of the losses, per token"
    pale, mean, teacher = left.lines
    assert pale.get_xydata()[[0, 59]].tolist() == [[0, 4.0], [59000, 3 + 1 / 60]]
    np.testing.assert_allclose(mean.get_ydata()[[0, 10, 59]], [4.0, *(np.mean([3 + 1 / (i + 1) for i in s]) for s in (
        range(7, 14), range(56, 60)))])  # fmt: skip
    assert (list(teacher.get_ydata()), teacher.get_linestyle()) == ([2.9, 2.9], "--")
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "student, training text", "teacher, training text: mean 2.90"
    ]  # fmt: skip
    # From 2 to 1/30 are nearly two decades: a logarithmic axis, with figures and not only powers of ten.
    assert right.get_yscale() == "log" and {"0.05", "0.1", "0.2", "0.5", "1", "2"} <= set(
        tick_texts(figure, right.yaxis)
    )
    assert left.get_yscale() == "linear"
    assert colours(tmp_path / "new" / "loss.png", "blue") > 300


def test_loss_curve_of_a_short_range_is_linear_and_zero_is_seen(tmp_path):
    lines = [{"step": i, "train/tokens": 8.0, "train/loss": 1 + i / 10} for i in range(9)]
    right = panels(plot_loss_curve(lines, tmp_path / "a.png"))["Distillation loss"]
    assert right.get_yscale() == "linear" and right.lines[0].get_marker() == "."
    # A loss of exactly 0 has no place on a logarithmic axis; a legend alone has no pixel of this blue.
    plot_loss_curve([line | {"train/loss": 0.0} for line in lines], tmp_path / "zero.png")
    assert colours(tmp_path / "zero.png", "blue") > 300
    assert colours(tmp_path / "zero.png", "orange") == 0
    missing = [line | {"train/loss": None} for line in lines[:3]] + lines[3:]  # steps with a loss that was not finite
    figure = plot_loss_curve(missing, tmp_path / "null.png")
    assert panels(figure)["Distillation loss"].lines[0].get_xdata().tolist() == [24, 32, 40, 48, 56, 64]
    for nothing in ([], [{"step": 1, "train/tokens": 8.0}], [{"step": 1, "train/loss": 1.0}]):
        with pytest.raises(DataError, match="no metric line"):
            plot_loss_curve(nothing, tmp_path / "none.png")


def test_loss_curve_marks_what_was_lost_and_won_back_on_held_out_text(tmp_path):
    heldout = {"wiki": {"teacher": 2.9, "pruned": 4.4, "distilled": 3.4}, "news": {"pruned": 5.0}}
    lines = training_lines(range(9, 60, 10))
    lines[2]["eval/wiki_lm_loss_nats"] = 3.6
    left = panels(plot_loss_curve(lines, tmp_path / "a.png", heldout))["LM loss"]
    marks = {
        (line.get_color(), line.get_marker(), *line.get_xydata()[0])
        for line in left.lines
        if len(line.get_xdata()) == 1
    }
    assert marks == {
        ("C1", "o", 0, 4.4), ("C1", "o", 60000, 3.4), ("C1", "_", 60000, 2.9), ("C1", "None", 30000, 3.6),
        ("C2", "o", 0, 5.0),
    }  # fmt: skip
    assert [text.get_text() for text in left.get_legend().get_texts()][2:] == [
        "wiki, held out: pruned ○ 4.40, distilled ● 3.40, teacher – 2.90", "news, held out: pruned ○ 5.00"
    ]  # fmt: skip


def test_a_teacher_that_is_corrected_meanwhile_is_a_curve(tmp_path):
    lines = [line | {"train/correct_loss": 2.0} for line in training_lines(range(20))]
    lines[0]["train/teacher_lm_loss_nats"] = 3.5
    _, teacher = panels(plot_loss_curve(lines, tmp_path / "a.png"))["LM loss"].lines
    assert teacher.get_ydata().tolist() == [3.5, *[2.9] * 19] and teacher.get_linestyle() == "--"
    assert "corrected" in teacher.get_label()


def panels(figure: Figure) -> dict:
    """Title -> panel; colour bars have none."""
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def many_colours(path: Path) -> bool:
    """Whether the file shows curves or maps in many colours, and not empty frames."""
    image = imread(path)
    return len(set(map(tuple, (image[::4, ::4, :3].reshape(-1, 3) * 255).astype(int).tolist()))) > 50


def dense_ranking(layers: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ranking = {"hidden": torch.rand(64, generator=generator) + 0.1, "depth": torch.rand(layers, generator=generator)}
    for i in range(layers):
        ranking |= {f"layers.{i}.mlp": torch.rand(96, generator=generator).exp() * (i + 1)}
        ranking |= {f"layers.{i}.heads": torch.rand(8, generator=generator)}
        ranking |= {f"layers.{i}.groups": torch.rand(2, generator=generator)}
    return ranking


def test_importance_of_a_dense_model_has_four_panels(tmp_path):
    ranking = dense_ranking()
    ranking["layers.0.heads"] = torch.zeros(8)  # a dead layer divides by nothing
    found = panels(plot_importance(ranking, tmp_path / "new" / "importance.png"))
    assert set(found) == {
        "MLP neurons, sorted within their layer", "Query heads", "Query groups", "Hidden channels, sorted"
    }  # fmt: skip
    curves = [line.get_ydata() for line in found["MLP neurons, sorted within their layer"].lines]
    assert len(curves) == 6
    np.testing.assert_allclose(curves[4], sorted(ranking["layers.4.mlp"].tolist(), reverse=True))
    for title, name in (("Query heads", "heads"), ("Query groups", "groups")):
        grid = found[title].images[0].get_array()
        want = ranking[f"layers.3.{name}"] / ranking[f"layers.3.{name}"].max()
        np.testing.assert_allclose(grid[3], want.numpy(), rtol=1e-6)
    assert found["Query heads"].images[0].get_array()[0].tolist() == [0.0] * 8
    assert many_colours(tmp_path / "new" / "importance.png")
    with pytest.raises(DataError, match="no layers.0.heads"):
        plot_importance({"hidden": torch.ones(4)}, tmp_path / "x.png")


def test_importance_of_a_model_with_experts(tmp_path):
    dense = dense_ranking()
    experts = {name: x for name, x in dense.items() if not name.endswith(".mlp")}
    for i in range(6):
        experts[f"layers.{i}.experts"] = torch.arange(1.0, 5)
        experts |= {f"layers.{i}.experts.{e}.mlp": torch.rand(16) for e in range(4)}
    found = panels(plot_importance(experts, tmp_path / "experts.png"))
    assert set(found) == {"Query heads", "Query groups", "Experts", "Hidden channels, sorted"}
    np.testing.assert_allclose(found["Experts"].images[0].get_array()[5], [0.25, 0.5, 0.75, 1.0])
    # The first layer may be a dense one: it has neurons and no experts.
    mixed = {name: x for name, x in experts.items() if not name.startswith("layers.0.experts")}
    found = panels(plot_importance(mixed | {"layers.0.mlp": dense["layers.0.mlp"]}, tmp_path / "mixed.png"))
    assert len(found) == 5 and len(found["MLP neurons, sorted within their layer"].lines) == 1
    grid = found["Experts"].images[0].get_array()
    assert np.ma.getmaskarray(grid).tolist() == [[True] * 4] + [[False] * 4] * 5
    assert many_colours(tmp_path / "mixed.png")


def three_metrics() -> Scores:
    """l2_mean, its exact opposite mean_mean, and taylor, which measures no hidden channels; three kinds of depth."""
    first = {name: x for name, x in dense_ranking(4).items() if name != "depth"}
    tensors = {f"l2_mean.{name}": x for name, x in first.items()}
    tensors |= {f"mean_mean.{name}": 10 - x for name, x in first.items()}
    tensors |= {f"taylor.{name}": 2 * x for name, x in first.items() if name != "hidden"}
    tensors |= {"depth.bi": torch.tensor([0.4, 0.1, 0.2, 0.3]), "depth.lm_loss": torch.tensor([2.5, -0.1, 0.7, 1.0])}
    blocks = torch.full((4, 4), torch.nan)
    for i in range(4):
        blocks[i, : 4 - i] = torch.arange(1.0, 5 - i) / 10 + i
    return Scores(tensors | {"depth.bi_blocks": blocks}, {"model": "m"})


def test_agreement_has_a_panel_an_axis(tmp_path):
    found = panels(plot_agreement(three_metrics(), tmp_path / "agreement.png"))
    assert set(found) == {
        f"{axis}: agreement of ranks" for axis in ("Hidden channels", "Query heads", "Query groups", "MLP neurons")
    }
    order = ["mean_mean", "l2_mean", "taylor"]
    heads = found["Query heads: agreement of ranks"]
    assert [label.get_text() for label in heads.get_xticklabels()] == order
    assert [label.get_text() for label in heads.get_yticklabels()] == order
    np.testing.assert_allclose(heads.images[0].get_array(), [[1, -1, -1], [-1, 1, 1], [-1, 1, 1]], rtol=1e-12)
    hidden = found["Hidden channels: agreement of ranks"]
    mask = np.ma.getmaskarray(hidden.images[0].get_array())
    assert mask.tolist() == [[False, False, True], [False, False, True], [True, True, True]]
    assert sorted(text.get_text() for text in hidden.texts) == ["-1.00", "-1.00", "1.00", "1.00"]
    assert many_colours(tmp_path / "agreement.png")
    one = Scores({name: x for name, x in three_metrics().tensors.items() if name.startswith("l2_mean")}, {})
    with pytest.raises(DataError, match="two width metrics"):
        plot_agreement(one, tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()


def test_depth_has_a_curve_a_metric_and_a_map_of_blocks(tmp_path):
    found = panels(plot_depth(three_metrics(), tmp_path / "depth.png"))
    assert list(found) == ["bi", "bi_blocks", "lm_loss"]
    assert (found["bi"].get_yscale(), found["lm_loss"].get_yscale()) == ("linear", "linear")  # 0.1 to 0.4; -0.1 to 2.5
    wide = Scores({"depth.bi": torch.tensor([1.0, 0.04, 0.03, 0.2])}, {})
    figure = plot_depth(wide, tmp_path / "wide.png")
    assert {"0.05", "0.1", "0.2", "0.5", "1"} <= set(tick_texts(figure, panels(figure)["bi"].yaxis))
    np.testing.assert_allclose(found["bi"].lines[0].get_ydata(), [0.4, 0.1, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(found["lm_loss"].lines[0].get_ydata(), [2.5, -0.1, 0.7, 1.0], rtol=1e-6)
    image = found["bi_blocks"].images[0]
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[i + n > 4 for n in range(1, 5)] for i in range(4)]
    assert image.get_array()[2, 1] == pytest.approx(2.2)
    assert image.get_extent() == [0.5, 4.5, 3.5, -0.5]  # the first column is blocks of one layer
    assert image.get_cmap().get_bad()[:3].tolist() == [1, 1, 1]
    assert colours(tmp_path / "depth.png", "blue") > 300 and many_colours(tmp_path / "depth.png")
    with pytest.raises(DataError, match="no depth metric"):
        plot_depth(Scores({"l2_mean.hidden": torch.ones(4)}, {}), tmp_path / "none.png")


def finished_run(run: Path, scores: Scores, search: dict[str, str | None]) -> Path:
    """What the report reads of the other stages."""
    results = {
        "student": {"shape": {"layers": 2, "hidden": 32, "ffn": 48, "heads": 4}},
        "search": {},
        "evaluate": {"recovered": {"wiki": 0.75, "news": None}},
        "score": {},
        "distill": {"saving_seconds": 3.0, "training_seconds": 60.0},
    }
    for stage, values in results.items():
        (run / stage).mkdir(parents=True)
        write_manifest(run / stage, search if stage == "search" else {}, {}, values)
    save_scores(run / "score" / FILE, scores)
    lines = training_lines(range(4))
    (run / "distill" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"params": 1000, "loss_wiki": 2.5, "tokens_trained": 0, "forward_tokens_per_second": 9.6}
    rows = [row | {"model": name} for name in ("teacher", "pruned", "distilled")]
    (run / "evaluate" / "results.json").write_text(json.dumps(rows))
    (run / "search" / "candidates.json").write_text(json.dumps([results["student"]["shape"] | {"params": 1000}]))
    return run


def test_the_report_shows_the_search(tmp_path):
    run = finished_run(tmp_path / "a", three_metrics(), {"search.width": None, "search.depth": None})
    shape = {"layers": 2, "hidden": 32, "ffn": 48, "heads": 4}
    found = [shape | {"params": 1000 - i, "predicted_loss": i, "zero_shot_loss": 3.0 + i} for i in range(3)]
    (run / "search" / "candidates.json").write_text(json.dumps(found))
    (run / "rank").mkdir()
    (run / "rank" / "ranking.json").write_text(json.dumps([found[1] | {"candidate": 1, "loss": 2.0}]))
    for index, folder in ((0, "progress/distill"), (1, "progress/distill"), (1, "distill")):
        (run / "rank" / str(index) / folder).mkdir(parents=True)
        lines = training_lines(range(4 if index else 2))
        (run / "rank" / str(index) / folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_report(run, run / "report")
    text = (run / "report" / "report.md").read_text()
    assert text.index("## Candidates") < text.index("## Importance")
    for name in ("pareto.png", "prediction.png", "ranks.png"):
        assert f"({name})" in text and (run / "report" / name).stat().st_size > 5000


def test_the_report_shows_what_decided_the_cut(tmp_path):
    run = finished_run(tmp_path / "a", three_metrics(), {"search.width": "taylor", "search.depth": "lm_loss"})
    write_report(run, run / "report")
    text = (run / "report" / "report.md").read_text()
    assert "ranks units by `taylor` and layers by `lm_loss`" in text
    linked = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert sorted(linked) == ["agreement.png", "depth.png", "importance.png", "loss.png", "sizes.png"]
    assert sorted(path.name for path in (run / "report").glob("*.png")) == sorted(linked)
    assert all((run / "report" / name).stat().st_size > 5000 for name in linked)
    assert "| layer | bi | lm_loss |\n| ---: | ---: | ---: |\n| 0 | 0.4 | 2.5 |\n| 1 | 0.1 | -0.1 |\n" in text


def test_the_report_of_one_metric_has_no_agreement(tmp_path):
    tensors = {f"l2_mean.{name}": x for name, x in dense_ranking(20).items() if name != "depth"}
    tensors["depth.bi"] = torch.rand(20)
    run = finished_run(tmp_path / "a", Scores(tensors, {}), {"search.width": None, "search.depth": None})
    write_report(run, run / "report")
    text = (run / "report" / "report.md").read_text()
    assert "ranks units by `l2_mean` and layers by `bi`" in text
    assert "agreement" not in text and not (run / "report" / "agreement.png").exists()
    assert "| layer |" not in text  # 20 rows would bury the rest
    (run / "score" / FILE).unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        write_report(run, run / "report")


def test_the_table_of_layers_is_short_or_absent():
    def of(values: torch.Tensor) -> Scores:
        return Scores({"depth.bi": values, "depth.bi_blocks": torch.eye(len(values))}, {})

    assert len(depth_rows(of(torch.rand(SHORT_TABLE_LAYERS)))) == SHORT_TABLE_LAYERS
    assert depth_rows(of(torch.rand(SHORT_TABLE_LAYERS + 1))) == []
    assert depth_rows(of(torch.tensor([0.5, torch.nan]))) == [{"layer": 0, "bi": 0.5}, {"layer": 1, "bi": None}]
    assert depth_rows(Scores({"depth.bi_blocks": torch.eye(2)}, {})) == []


def test_sizes_has_one_colour_a_text(tmp_path):
    rows = [
        {"model": name, "params": params, "lm_loss_nats": loss + shift, "text": text}
        for text, shift in (("wiki", 0.0), ("news", 0.6))
        for name, params, loss in (("teacher", 134515008, 2.85), ("pruned", 90000000, 5.2), ("student", 90000000, 3.3))
    ]
    figure = plot_sizes(rows, tmp_path / "two.png")
    (axes,) = figure.axes
    assert [points.get_offsets().tolist()[1] for points in axes.collections] == [[9e7, 5.2], [9e7, 5.8]]
    assert "100M" in tick_texts(figure, axes.xaxis) and axes.get_xlabel() == "parameters"
    assert axes.get_ylabel() == "LM loss, nats per token"
    labels = [(text.get_text(), text.get_ha()) for text in axes.texts]
    # A point of each text at one size: the labels stand on different sides.
    assert labels[1] == ("pruned 5.20", "left") and labels[4] == ("pruned 5.80", "right")
    assert len(set(map(tuple, (points.get_facecolor()[0] for points in axes.collections)))) == 2
    plot_sizes(rows[:3], tmp_path / "one.png")
    assert colours(tmp_path / "one.png", "orange") > 100 and colours(tmp_path / "one.png", "blue") == 0
    with pytest.raises(DataError, match="no result"):
        plot_sizes([], tmp_path / "none.png")


def test_values_stay_whole_on_a_narrow_terminal():
    row = {"model": "distilled", "parameters": 134515008, "LM loss wiki": "2.9423", "LM loss django": "3.1837"}
    row |= {"tokens trained": 102400, "forward tokens/s": 1082}
    console = Console(width=80, file=io.StringIO())
    console.print(rich_table("run", [row]))
    for value in ("distilled", "134,515,008", "2.9423", "3.1837", "102,400", "1,082"):
        assert value in console.file.getvalue()
