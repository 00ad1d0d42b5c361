"""A sweep runs every combination in a folder of its own, shares what is equal, outlives failures, ends in a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compactlm_nemo.artifacts import read_manifest
from compactlm_nemo.config.load import CONF
from compactlm_nemo.config.sweep import JOB, worst
from tests.support.tiny_run import command

SHARED = ("teacher", "tokens", "score", "search", "student")


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe with these arguments of python."""
    environment = os.environ | {"COLUMNS": "200", "WANDB_MODE": "disabled"} | environment
    return subprocess.run(
        [sys.executable, *words], cwd=CONF.parent, env=environment, capture_output=True, text=True, timeout=600
    )


def sweep(inputs: Path, folder: Path, *overrides: str) -> list[str]:
    """Arguments of a sweep; the last of a key counts."""
    return [*command(inputs, folder), "--multirun", *overrides]


@pytest.fixture(scope="module")
def swept(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return the folder of a sweep of three learning rates, of which the last is none, and how it ended."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    return folder, run(sweep(inputs, folder, "distill.lr=1e-4,3e-4,-1"))


def test_m_distill_lr_runs_both_into_folders_of_their_own_and_ends_with_one_table(
    swept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = swept
    for lr in (0.0001, 0.0003):
        manifest = read_manifest(folder / f"distill.lr={lr}" / "distill")
        assert manifest["settings"]["distill.lr"] == lr
        assert (folder / f"distill.lr={lr}" / "report" / "report.md").is_file()
    table = (folder / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + 3 and "| run | loss | loss_a |" in table[0]
    losses = [float(line.split("|")[2]) for line in table[2:4]]
    assert losses == sorted(losses)
    assert done.stdout.count("Runs of") == 1


def test_stages_that_the_swept_setting_does_not_decide_are_made_once(
    swept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = swept
    first, second = folder / "distill.lr=0.0001", folder / "distill.lr=0.0003"
    for artifact in SHARED:
        assert (second / artifact).resolve() == (first / artifact).resolve()
        assert not (first / artifact).is_symlink()
    assert not (second / "distill").is_symlink()
    assert f"score: done before in {first.resolve()}, linked" in done.stdout


def test_a_run_that_fails_stops_no_other_and_the_exit_code_says_so(
    swept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = swept
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: distill.lr=-1.0 must be > 0; the paper uses 2e-4."]
    assert "distill.lr=-1.0 must be > 0" in (folder / "sweep.md").read_text().splitlines()[-1]


def test_the_same_sweep_goes_on_and_skips_what_is_done(
    inputs: Path, swept: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, _ = swept
    before = (folder / "distill.lr=0.0001" / "distill" / "manifest.json").stat().st_mtime_ns
    done = run(sweep(inputs, folder, "distill.lr=1e-4,3e-4"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distill: done before, skipped") == 2
    assert (folder / "distill.lr=0.0001" / "distill" / "manifest.json").stat().st_mtime_ns == before
    assert len((folder / "sweep.md").read_text().splitlines()) == 2 + 3  # with what failed before


def test_a_sweep_of_one_stage_takes_what_it_reads_from_the_runs_there_are(
    inputs: Path, swept: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, _ = swept
    words = [
        word.replace("recipes.compress", "recipes.distill")
        for word in sweep(inputs, folder, "distill.beta2=choice(0.9)")
    ]
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert read_manifest(folder / "distill.beta2=0.9" / "distill")["settings"]["distill.beta2"] == 0.9
    assert (folder / "distill.beta2=0.9" / "student").is_symlink()


def test_a_dry_run_of_a_sweep_plans_each_run_and_writes_nothing(inputs: Path, tmp_path: Path) -> None:
    words = sweep(inputs, tmp_path / "run", "dry_run=true", "distill.lr=1e-4,3e-4", "hydra.launcher.x=1")
    done = run(words)
    assert done.returncode == 0, done.stderr
    for lr in ("0.0001", "0.0003"):
        assert f"plan of {tmp_path}/run/distill.lr={lr}\n" in done.stdout
        assert "distill: " in done.stdout and f"writes {tmp_path}/run/distill.lr={lr}/distill" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["-m", "run.dir=a,b", "model.source=x"], {}, "run.dir is the folder of the whole sweep"),
        (["-m", "run.dir=a", "distill.lr=1,x"], {}, "distill.lr"),
        (["-m", "run.dir=a", "model.source=x", "hydra/launcher=absent"], {}, "hydra/launcher/absent"),
        (["-m", "hydra/launcher=basic", "run.dir=a"], {"WORLD_SIZE": "2", "RANK": "0"}, "every rank sweeps by itself"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, words: list[str], environment: dict[str, str], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.distill", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(CONF.parent)} | environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_recipes_that_make_no_run_do_not_sweep() -> None:
    done = run(["-m", "recipes.verify", "-m", "run.dir=a,b"])
    assert done.returncode == 2 and "--multirun sweeps recipes that make a run" in done.stderr


def test_the_code_of_a_sweep_is_that_of_the_failure_which_a_requeue_serves_first() -> None:
    assert [worst(codes) for codes in ([0, 0], [0, 2], [2, 1, 75], [2, 1], [143, 0])] == [0, 2, 75, 1, 143]


def test_ranks_of_torchrun_sweep_alike(inputs: Path, tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    words += ["--rdzv-endpoint=localhost:0", *sweep(inputs, tmp_path / "run", "distill.lr=1e-4,3e-4")]
    done = run(words)
    assert done.returncode == 0, done.stderr
    for lr in ("0.0001", "0.0003"):
        note = json.loads((tmp_path / "run" / f"distill.lr={lr}" / JOB).read_text())
        assert note["exit_code"] == 0
    assert len((tmp_path / "run" / "sweep.md").read_text().splitlines()) == 2 + 2


def test_a_launcher_runs_the_jobs_elsewhere(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = sweep(inputs, tmp_path / "run", "distill.lr=1e-4,-1", "hydra/launcher=submitit_local")
    done = run(words)
    assert done.returncode == 2, done.stderr
    assert read_manifest(tmp_path / "run" / "distill.lr=0.0001" / "distill")["results"]["loss"] > 0
    table = (tmp_path / "run" / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + 2 and "distill.lr=-1.0 must be > 0" in table[-1]
