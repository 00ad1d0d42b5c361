"""The prune stage with layers trained by themselves, as users run it: killed, on two ranks, refused."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from compactlm_nemo.config.prune import Blocks, PruneConfig
from compactlm_nemo.errors import ConfigError
from tests.support import commands
from tests.support.stopped_runs import equal_weights
from tests.support.tiny_run import command

BLOCKS = ["prune.blocks=distill", "prune.block_passes=60", "prune.block_samples=12", "prune.block_lr=3e-3"]


@pytest.fixture(scope="module")
def searched(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "searched"
    for recipe in ("import_model", "tokenize", "score", "search"):
        done = commands.run(command(inputs, run, recipe=recipe))
        assert done.returncode == 0, done.stderr
    return run


def test_a_killed_run_goes_on_to_the_same_bits(inputs: Path, searched: Path, tmp_path: Path) -> None:
    whole, killed = (Path(shutil.copytree(searched, tmp_path / name)) for name in ("whole", "killed"))
    words = command(inputs, whole, *BLOCKS, recipe="prune")
    assert commands.run(words).returncode == 0
    results = json.loads((whole / "student" / "manifest.json").read_text())["results"]
    assert len(results["block_losses"]) == 2
    assert all(layer["after"] < 0.9 * layer["before"] for layer in results["block_losses"])
    assert not (whole / "progress" / "prune").exists()

    kept = [killed / "progress" / "prune" / f"layer_{i}_tp_0_ep_0.safetensors" for i in (0, 1)]
    words = command(inputs, killed, *BLOCKS, recipe="prune")
    process = commands.start(words, tmp_path / "out", tmp_path / "err")
    while process.is_alive() and not kept[0].exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert kept[0].exists() and not kept[1].exists()
    other = commands.run([*words, "prune.block_passes=61"])
    assert other.returncode == 2 and "another prune.block_passes=60 vs 61" in other.stderr
    done = commands.run(words)
    assert done.returncode == 0, done.stderr
    assert equal_weights(whole / "student", killed / "student")
    again = json.loads((killed / "student" / "manifest.json").read_text())["results"]
    assert again["block_losses"] == results["block_losses"]


def test_two_ranks_train_as_one_on_the_teachers_stream(inputs: Path, searched: Path, tmp_path: Path) -> None:
    results = []
    for ranks, layout in ((1, []), (2, ["parallel.pp=2"]), (2, [])):
        run = Path(shutil.copytree(searched, tmp_path / f"{ranks}{len(layout)}"))
        words = [*BLOCKS, "prune.block_passes=3", "prune.block_inputs=teacher", "prune.block_samples=null", *layout]
        done = commands.run(command(inputs, run, *words, recipe="prune"), ranks=ranks)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((run / "student" / "manifest.json").read_text())["results"])
    for other in results[1:]:
        for got, want in zip(other["block_losses"], results[0]["block_losses"], strict=True):
            assert got == pytest.approx(want, rel=1e-3)
        assert other["loss_after"] == pytest.approx(results[0]["loss_after"], rel=1e-4)


def test_a_dry_run_tells_what_layers_are_trained_on(inputs: Path, tmp_path: Path) -> None:
    done = commands.run(command(inputs, tmp_path / "run", *BLOCKS, "dry_run=true"))
    assert done.returncode == 0, done.stderr
    line = "each layer is trained by itself on the student's stream: 12 windows x 60 passes = 11,520 tokens a layer"
    assert line in done.stdout
    assert "by itself" not in commands.run(command(inputs, tmp_path / "run", "dry_run=true")).stdout


def test_a_step_must_be_of_equally_many_windows_of_each_rank(inputs: Path, searched: Path) -> None:
    done = commands.run(command(inputs, searched, *BLOCKS, "prune.block_batch=3", recipe="prune"), ranks=2)
    assert done.returncode == 2
    assert "prune.block_batch=3 must be a multiple of the 2 data-parallel ranks; use 4 or" in done.stderr


@pytest.mark.parametrize(
    "name, value",
    [
        ("block_lr", 0.0),
        ("block_lr", float("nan")),
        ("block_lr", 1.5),
        ("block_passes", 0),
        ("block_batch", 0),
        ("block_samples", 0),
    ],
)
def test_a_value_that_cannot_be_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"prune.{name}={value} must be"):
        PruneConfig(blocks=Blocks.distill, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["block_inputs=teacher", "block_passes=3", "block_samples=4"])
def test_a_setting_without_effect_is_refused(inputs: Path, tmp_path: Path, name: str) -> None:
    done = commands.run(command(inputs, tmp_path / "run", f"prune.{name}", "dry_run=true"))
    assert done.returncode == 2
    assert f"prune.{name.split('=')[0]} needs prune.blocks=distill; set it, or leave it out." in done.stderr
