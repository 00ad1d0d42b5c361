"""Runs side by side: one table, what differs, the plot, runs that are not finished or not of one teacher, W&B."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

from compactlm_nemo.artifacts import read_manifest
from tests.support import commands
from tests.support.stopped_runs import copy_artifacts
from tests.support.tiny_run import command
from tests.support.wandb_files import finished_records, history_rows

UNFINISHED = "distill.stop_after=4"


def compare(*words: object, columns: int = 200) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": str(columns), "WANDB_MODE": "disabled"}
    return commands.run(["-m", "recipes.compare", *map(str, words)], env=env)


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`long` and `short`, finished; `begun`, stopped in its distillation; `other`, an import of another teacher."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *words: str, recipe: str = "compress") -> None:
        done = commands.run(command(inputs, folder / name, *words, recipe=recipe))
        assert done.returncode == 0, done.stderr

    run("long")
    copy_artifacts(folder / "long", folder / "short", ("teacher", "tokens", "score"))
    run("short", "search.ffn=[48]", "distill.steps=4", "evaluate.tokens=128")
    copy_artifacts(folder / "long", folder / "begun")
    run("begun", "distill.lr=2e-3", UNFINISHED, recipe="distill")
    shutil.copytree(inputs / "teacher", folder / "another")
    weights = load_file(folder / "another" / "model.safetensors")
    save_file({k: 2 * v for k, v in weights.items()}, folder / "another" / "model.safetensors", {"format": "pt"})
    run("other", f"model.source={folder}/another", recipe="import_model")
    return folder


def _rows(page: str, title: str) -> dict[str, list[str]]:
    """First cell -> the other cells of a Markdown table's rows, of the table behind a title, its head included."""
    lines = page[page.index(title) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return {row[0]: row[1:] for row in [table[0], *table[2:]]}


def test_finished_runs_are_a_table_a_plot_and_what_differs(runs: Path, tmp_path: Path) -> None:
    done = compare(runs / "long", runs / "short", f"out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "compare.md").read_text()
    rows = _rows(page, "# Runs compared")
    head = rows["run"]
    assert head[:6] == ["stands", "teacher", "parameters", "tokens trained", "validation loss", "forward tokens/s"]
    assert head[6:] == ["loss/a", "top1_agreement/a", "kl/a"]
    for name, params, tokens in (("long", "10,032", "384"), ("short", "12,336", "256")):
        row = dict(zip(head, rows[str(runs / name)], strict=True))
        assert (row["stands"], row["parameters"], row["tokens trained"]) == ("done", params, tokens)
        quality = json.loads((runs / name / "evaluate" / "quality.json").read_text())["metrics"]
        loss = next(metric for metric in quality if metric["metric"] == "loss/a")["models"]["distilled"]
        assert row["loss/a"] == "{value:.4g} [{low:.4g}, {high:.4g}]".format(**loss)
        results = json.loads((runs / name / "evaluate" / "results.json").read_text())
        speed = next(each for each in results if each["model"] == "distilled")["forward_tokens_per_second"]
        assert row["forward tokens/s"] == f"{round(speed):,}"
        assert row["validation loss"] == f"{read_manifest(runs / name / 'distill')['results']['loss']:.4g}"
    # One teacher that was measured on two lengths of the text has two lines.
    assert rows[f"teacher of {runs}/long"][2] == rows[f"teacher of {runs}/short"][2] == "40,128"
    assert "- evaluate.tokens differs: the losses are over other parts of the texts." in page
    differing = _rows(page, "## Settings that differ")
    assert differing.keys() == {"setting", "search.ffn", "distill.steps", "evaluate.tokens"}
    assert (differing["search.ffn"], differing["distill.steps"]) == (["[32]", "[48]"], ["6", "4"])
    assert "![Held-out loss over parameters, tokens trained and forward speed](compare.png)" in page
    image = imread(tmp_path / "out" / "compare.png")[..., :3]
    assert (abs(image * 255 - (255, 127, 14)).max(-1) < 3).sum() > 300, "points in the colour of the first text"
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [run["parameters"] for run in told["runs"]] == [10032, 12336]
    assert told["runs"][0]["against_teacher"].keys() == {"loss/a"} and told["runs"][0]["metrics"].keys() > {"kl/a"}
    assert [row["setting"] for row in told["differences"]] == ["distill.steps", "evaluate.tokens", "search.ffn"]


@pytest.mark.parametrize("columns", [60, 80, 300])
def test_no_heading_and_no_value_is_cut_however_narrow_the_terminal(runs: Path, columns: int) -> None:
    done = compare(runs / "long", runs / "short", columns=columns)
    assert done.returncode == 0 and "…" not in done.stdout
    words = ("parameters", "validation", "tokens/s", "top1_agreement/a", "10,032", "12,336", "distill.steps")
    for word in (*words, str(runs / "long"), str(runs / "short")):
        assert word in done.stdout


def test_equal_settings_are_said(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "long", tmp_path / "copy")
    done = compare(runs / "long", tmp_path / "copy", f"out={tmp_path}/out")
    assert "the settings that decide results are the same" in done.stdout
    assert "## Settings that differ\n\nNone.\n" in (tmp_path / "out" / "compare.md").read_text()
    assert done.stdout.count("teacher of ") == 1


def test_a_run_that_is_not_finished_says_how_far_it_is(runs: Path, tmp_path: Path) -> None:
    done = compare(runs / "long", runs / "begun", f"out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "compare.md").read_text()
    rows = _rows(page, "# Runs compared")
    row = dict(zip(rows["run"], rows[str(runs / "begun")], strict=True))
    assert (row["stands"], row["tokens trained"], row["loss/a"]) == ("distill at step 4 of 6", "256", "–")
    cut = read_manifest(runs / "begun" / "student")["results"]["loss_after"]
    assert row["validation loss"] == f"{cut:.4g}", "that of the cut, as long as nothing better is measured"
    differing = _rows(page, "## Settings that differ")
    assert differing["distill.lr"] == ["0.001", "0.002"]
    assert "distill.steps" not in differing
    alone = compare(runs / "begun", f"out={tmp_path}/alone")
    assert alone.returncode == 0 and not (tmp_path / "alone" / "compare.png").exists()
    assert "compare.png" not in (tmp_path / "alone" / "compare.md").read_text()


def test_of_other_teachers_it_is_said(runs: Path, tmp_path: Path) -> None:
    done = compare(runs / "long", runs / "other", f"out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    teachers = [read_manifest(runs / name / "teacher")["fingerprint"][:12] for name in ("long", "other")]
    assert teachers[0] != teachers[1]
    line = f"the teachers differ ({runs}/long of {teachers[0]}, {runs}/other of {teachers[1]}): a loss a token means"
    assert line in done.stdout and line in (tmp_path / "out" / "compare.md").read_text()
    assert "up to import_model" in done.stdout


def test_folders_without_a_run_are_named_in_one_line(runs: Path, tmp_path: Path) -> None:
    done = compare(runs / "long", tmp_path, tmp_path / "gone", f"out={tmp_path}/out")
    want = f"error: runs={tmp_path}, {tmp_path}/gone holds no run; name the folder that a recipe wrote to.\n"
    assert (done.returncode, done.stderr) == (2, want)
    assert not (tmp_path / "out").exists()
    assert compare(runs / "long", runs / "long").returncode == 2


def test_a_damaged_artifact_is_no_number(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "long", tmp_path / "run")
    (tmp_path / "run" / "evaluate" / "quality.json").write_text("{}")
    done = compare(tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "quality.json" in done.stderr


def test_wandb_gets_the_table(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = compare(runs / "long", runs / "begun", f"out={tmp_path}/out", "wandb.mode=offline", "wandb.name=both")
    assert done.returncode == 0, done.stderr
    records = finished_records(tmp_path / "out", 1)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.display_name, run.job_type) == ("both", "compare")
    (row,) = (each for each in history_rows(records) if "compare/_type" in each or "compare" in each)
    logged = row.get("compare") or {k.removeprefix("compare/"): v for k, v in row.items() if k.startswith("compare/")}
    assert (logged["_type"], logged["nrows"]) == ("table-file", 3)
    (file,) = (tmp_path / "out").rglob("*.table.json")
    table = json.loads(file.read_text())
    by_run = {values[0]: dict(zip(table["columns"], values, strict=True)) for values in table["data"]}
    assert list(by_run) == [f"teacher of {runs}/long", str(runs / "long"), str(runs / "begun")]
    assert by_run[str(runs / "long")]["parameters"] == 10032
    assert by_run[str(runs / "begun")]["loss/a"] is None and "loss/a" in table["columns"]
