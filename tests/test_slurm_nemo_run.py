"""slurm/nemo_run.py starts recipes with NeMo-Run, where that is installed: on two ranks here, and as a batch script."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF
from tests.support.slurm_cluster import slurm_cluster
from tests.support.tiny_run import command

ROOT = CONF.parent
PYTHON = os.environ.get("NEMO_RUN_PYTHON", sys.executable)
"""Interpreter with nemo-run: it brings 540 MB, so it may have an environment of its own."""

LOCAL = """
import json, sys
import nemo_run as run
from slurm.nemo_run import recipe_script
words, environment = json.loads(sys.argv[1])
executor = run.LocalExecutor(ntasks_per_node=2, launcher="torchrun", env_vars=environment, packager=run.Packager())
run.run(recipe_script(words), executor, name="import")
"""


@pytest.fixture(scope="module", autouse=True)
def nemo_run() -> None:
    done = subprocess.run([PYTHON, "-c", "import nemo_run, leptonai"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no such interpreter").splitlines()[-1]
        pytest.skip(f"needs the extra nemo-run in {PYTHON}, or NEMO_RUN_PYTHON of another environment: {reason}")


def _run(tmp_path: Path, *words: str, env: Mapping[str, str] = os.environ, cwd: Path = ROOT) -> str:
    own = {"NEMORUN_HOME": str(tmp_path / "home"), "COLUMNS": "4000", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    own["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # of torchrun
    done = subprocess.run([PYTHON, *words], cwd=cwd, env={**env, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_recipe_runs_on_two_ranks(inputs: Path, tmp_path: Path) -> None:
    _, _, *overrides = command(inputs, tmp_path / "run", "parallel.tp=2")
    # NeMo-Run quotes words for the shell of a batch script; its LocalExecutor has none, and leaves the quotes.
    words = ["import_model", *(word for word in overrides if shlex.quote(word) == word)]
    out = _run(tmp_path, "-c", LOCAL, json.dumps([words, {"PYTHONPATH": str(ROOT)}]))
    assert (tmp_path / "run" / "teacher" / "manifest.json").is_file(), out
    parts = sorted(path.name for path in (tmp_path / "run" / "teacher").rglob("*.distcp"))
    assert {name.split("_")[2] for name in parts} == {"0", "1"}, "each rank wrote its share"


@pytest.mark.slow
def test_a_job_of_a_real_slurm_runs_in_the_folder_it_was_started_from(inputs: Path, tmp_path: Path) -> None:
    for name in ("recipes", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    site = ["site.account=any", "site.partition=all", "site.gpus_per_node=1", f"site.environment.PYTHONPATH={ROOT}"]
    words = ["import_model", "time=10", *site, *command(inputs, Path("a run"))[2:]]
    with slurm_cluster(tmp_path) as env:
        out = _run(tmp_path, "-m", "slurm.nemo_run", *words, env=env, cwd=tmp_path)
    assert (tmp_path / "a run" / "teacher" / "manifest.json").is_file(), out


def test_a_dry_run_shows_a_batch_script_of_the_site() -> None:
    words = ["compress", "site=example", "nodes=2", "chain=3", "time=08:00:00", "site.modules=[cuda/13.0]"]
    words += ["experiment=llama31_8b_to_4b_width", "run.dir=/runs/x", "wandb.name='a b'", "dry_run=true"]
    out = _run(Path("/nonexistent"), "-m", "slurm.nemo_run", *words)
    lines = [line.strip() for line in out.splitlines()]
    for option in ("account=my_project", "partition=batch", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8"):
        assert f"#SBATCH --{option}" in lines
    for option in ("time=08:00:00", "requeue", "exclusive", "qos=normal", "cpus-per-task=96"):
        assert f"#SBATCH --{option}" in lines
    for line in ("export NCCL_IB_HCA=mlx5", f"export PYTHONPATH={ROOT}", "module load cuda/13.0"):
        assert line in lines
    assert "export TORCHX_MAX_RETRIES=2" in lines, "three starts in all"
    (srun,) = (line for line in lines if line.startswith("srun --output"))
    assert "--container-image /images/compactlm.sqsh" in srun and f"--container-workdir={ROOT} torchrun" in srun
    assert f"{ROOT}:{ROOT},/data:/data,/models:/models" in srun
    assert "--nnodes 2 --nproc-per-node 8" in srun
    assert srun.endswith(
        """-m recipes.compress nodes=2 experiment=llama31_8b_to_4b_width run.dir=/runs/x 'wandb.name='"'"'a b'"'"''"""
    )
