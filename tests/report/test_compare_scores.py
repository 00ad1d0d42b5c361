"""The command on two files of its own, end to end: what it prints, what it refuses, and how."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compactlm_nemo.config.evaluate import CompareConfig
from compactlm_nemo.config.load import COMPARE, compose_root, schema_reference
from compactlm_nemo.config.score import WidthMetric
from compactlm_nemo.errors import ConfigError, DataError, NumericsError
from compactlm_nemo.importance.scores import FILE, Scores, save_scores
from compactlm_nemo.report.compare_scores import comparison_rows, header_lines, metric_pairs
from recipes import compare_scores
from tests.support import commands

MODEL, OTHER_MODEL = "ab" * 32, "cd" * 32


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return commands.run(["-m", "recipes.compare_scores", *words], env={**os.environ, "COLUMNS": "120"})


def _tensors(metric: str, sign: int = 1) -> dict[str, torch.Tensor]:
    """Two layers whose ranks are known: 0, 1, 2, ..., or the opposite."""
    lengths = {"hidden": 8}
    for i in range(2):
        lengths |= {f"layers.{i}.heads": 4, f"layers.{i}.groups": 2, f"layers.{i}.mlp": 6}
    return {f"{metric}.{name}": sign * torch.arange(float(length)) for name, length in lengths.items()}


def _about(**changes: str) -> dict[str, str]:
    metadata = {"model": MODEL, "calibration": "12" * 32, "samples": "64", "sequence_length": "16", "neurons": "after"}
    return metadata | changes


def _blocks(*, last: float) -> torch.Tensor:
    return torch.tensor([[0.1, 0.5], [last, torch.nan]])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of a score stage and a file; they share l2_mean, bi and bi_blocks."""
    a = _tensors("l2_mean") | {"depth.bi": torch.tensor([1.0, 2.0]), "depth.bi_blocks": _blocks(last=0.2)}
    b = _tensors("l2_mean") | {"depth.bi": torch.tensor([2.0, 1.0]), "depth.bi_blocks": _blocks(last=0.9)}
    b["l2_mean.layers.1.mlp"] = torch.tensor([0.0, 1, 2, 3, 5, 4])
    (tmp_path / "a").mkdir()
    save_scores(tmp_path / "a" / FILE, Scores(a | _tensors("taylor", -1), _about()))
    save_scores(tmp_path / "b.safetensors", Scores(b | _tensors("var_var"), _about(samples="128", neurons="before")))
    return tmp_path / "a", tmp_path / "b.safetensors"


def _cells(out: str) -> dict[tuple[str, str], list[str]]:
    """(metric, axis) -> the other cells of its row."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    return {(row[0], row[1]): row[2:] for row in rows}


def test_two_files_are_compared_metric_by_metric(files: tuple[Path, Path]) -> None:
    result = _run(f"a={files[0]}", f"b={files[1]}")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:3] == [f"model {MODEL[:12]}", "differs: neurons=after vs before", "differs: samples=64 vs 128"]
    assert "calibration" not in result.stdout
    # Vectors, values, tau, lowest tau, rho. One swap among six is one discordant pair of 15, and 1 - 6 * 2 / (6 * 35).
    assert _cells(result.stdout) == {
        ("l2_mean", "hidden"): ["1", "8", "1.0000", "1.0000", "1.0000"],
        ("l2_mean", "heads"): ["2", "8", "1.0000", "1.0000", "1.0000"],
        ("l2_mean", "groups"): ["2", "4", "1.0000", "1.0000", "1.0000"],
        ("l2_mean", "mlp"): ["2", "12", "0.9333", "0.8667", "0.9714"],
        ("bi", "depth"): ["1", "2", "-1.0000", "-1.0000", "-1.0000"],
        # 0.1, 0.5, 0.2 against 0.1, 0.5, 0.9: two of three pairs agree; the block that does not fit is left out.
        ("bi_blocks", "depth"): ["1", "3", "0.3333", "0.3333", "0.5000"],
    }


def test_two_metrics_of_one_file_are_compared(files: tuple[Path, Path]) -> None:
    result = _run(f"a={files[0]}", f"b={files[0]}", "width_a=l2_mean", "width_b=taylor")
    assert result.returncode == 0, result.stderr
    assert "measured under the same circumstances" in result.stdout
    cells = _cells(result.stdout)
    assert {key for key, _ in cells} == {"l2_mean vs taylor"}
    assert cells["l2_mean vs taylor", "mlp"] == ["2", "12", "-1.0000", "-1.0000", "-1.0000"]


def _one_line(stdout: str, stderr: str, status: object) -> str:
    """The line that a refusal consists of."""
    assert status == 2, stdout
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert stdout == ""
    return stderr


def test_other_models_and_missing_files_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    other, gone = tmp_path / "other.safetensors", tmp_path / "gone"
    save_scores(other, Scores(_tensors("l2_mean"), _about(model=OTHER_MODEL)))
    result = _run(f"a={files[0]}", f"b={other}")
    line = _one_line(result.stdout, result.stderr, result.returncode)
    for word in ("scores of different models cannot be compared", MODEL[:12], OTHER_MODEL[:12], str(other)):
        assert word in line
    result = _run(f"a={files[0]}", f"b={gone}")
    assert f"{gone} does not exist" in _one_line(result.stdout, result.stderr, result.returncode)


def test_what_cannot_be_read_or_named_is_refused(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def _refused(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["compare_scores", *words])
        with pytest.raises(SystemExit) as caught:
            compare_scores.main()
        return _one_line(*capsys.readouterr(), caught.value.code)

    a, b = (f"{key}={path}" for key, path in zip("ab", files, strict=True))
    save_scores(tmp_path / "other", Scores(_tensors("l2_mean"), _about(model=OTHER_MODEL)))
    assert "different models" in _refused(a, f"b={tmp_path / 'other'}", "dry_run=true")
    assert "gone does not exist" in _refused(a, f"b={tmp_path / 'gone'}", "dry_run=true")
    (tmp_path / "damaged").write_bytes(b"no scores")
    assert "is damaged" in _refused(a, f"b={tmp_path / 'damaged'}")
    assert "b must be set" in _refused(a)
    assert "width_a is set and width_b is not" in _refused(a, b, "width_a=taylor")
    assert "width_b is set and width_a is not" in _refused(a, b, "width_b=taylor")
    line = _refused(a, b, "width_a=taylor", "width_b=taylor")
    assert "width_b=taylor is not in" in line and "['l2_mean', 'var_var']" in line
    assert "widt_a" in _refused(a, b, "widt_a=taylor")


def test_help_names_every_setting_and_no_experiment() -> None:
    result = _run("--help")
    assert result.returncode == 0
    assert "recipes.compare_scores a=" in result.stdout
    assert "experiment" not in result.stdout and "run.dir" not in result.stdout
    rows = schema_reference(CompareConfig)
    assert [row[0] for row in rows] == ["a", "b", "width_a", "width_b", "dry_run"]
    for key, default, meaning, *_ in rows:
        assert f"  {key} = {default}\n      {meaning}\n" in result.stdout + "\n"
        assert meaning, f"{key} has no docstring"


def test_a_dry_run_shows_the_settings_and_no_table(files: tuple[Path, Path]) -> None:
    result = _run(f"a={files[0]}", f"b={files[1]}", "width_a=l2_mean", "width_b=var_var", "dry_run=true")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^(\w+): (.*)$", result.stdout, re.M) == [
        ("a", str(files[0])), ("b", str(files[1])), ("width_a", "l2_mean"), ("width_b", "var_var"), ("dry_run", "true"),
    ]  # fmt: skip
    assert "Kendall" not in result.stdout


def test_defaults_are_shown_as_one_types_them() -> None:
    shown = {key: default for key, default, *_ in schema_reference()}
    assert (shown["score.width"], shown["score.neurons"], shown["run.dir"]) == ("[l2_mean]", "after", "required")


def test_the_settings_are_typed() -> None:
    config = compose_root(COMPARE, ["a=x", "b=y", "width_a=taylor", "width_b=l2_l2"])
    assert isinstance(config, CompareConfig)
    assert (config.width_a, config.width_b) == (WidthMetric.taylor, WidthMetric.l2_l2)


def test_files_with_nothing_in_common_or_of_other_sizes() -> None:
    a, b = Scores(_tensors("l2_mean"), {}), Scores(_tensors("taylor"), {})
    with pytest.raises(ConfigError, match="nothing in both"):
        metric_pairs(CompareConfig(a="a", b="b"), a, b)
    longer = Scores(_tensors("l2_mean") | {"l2_mean.layers.1.mlp": torch.rand(7)}, {})
    with pytest.raises(DataError, match="axis mlp: layers.1.mlp has 6 values .* and 7"):
        comparison_rows(a, longer, [("l2_mean", "l2_mean")])
    three, two = (Scores({"depth.bi": torch.rand(n)}, {}) for n in (3, 2))
    with pytest.raises(DataError, match="axis depth: bi is"):
        comparison_rows(three, two, [("bi", "bi")])
    nothing = Scores({"depth.bi_blocks": torch.full((2, 2), torch.nan)}, {})
    with pytest.raises(DataError, match="no entry of bi_blocks"):
        comparison_rows(nothing, nothing, [("bi_blocks", "bi_blocks")])
    broken = Scores(_tensors("l2_mean") | {"l2_mean.hidden": torch.full((8,), torch.nan)}, {})
    with pytest.raises(NumericsError, match="NaN"):
        comparison_rows(a, broken, [("l2_mean", "l2_mean")])


def test_a_field_that_only_one_header_has_is_told() -> None:
    a, b = Scores({}, _about()), Scores({}, {"model": MODEL})
    assert f"differs: calibration={'12' * 6} vs (absent)" in header_lines(a, b)
