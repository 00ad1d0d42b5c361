"""The batch script with stubs of Slurm: syntax, its recipe, arguments that arrive untouched, when it is requeued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.slurm import OVERRIDES, RECORDER, ROOT, SCRIPT, run_with_stubs, write_script


def test_the_script_is_valid_bash_stops_at_errors_and_requeues() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    lines = SCRIPT.read_text().splitlines()
    assert "#SBATCH --requeue" in lines
    # Slurm reads options up to the first command, so that command comes after all of them.
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index(commands[0])


@pytest.mark.parametrize(
    "words",
    [[], [""], ["nothing"], ["experiment=smollm2_135m_cpu"], ["../recipes/distill"], ["__init__"], ["distill.py"]],
    ids=" ".join,
)
def test_a_recipe_that_is_none_ends_in_one_line_before_anything_starts(tmp_path: Path, words: list[str]) -> None:
    done = run_with_stubs(tmp_path, [*words, *OVERRIDES] if words else [])
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: RECIPE={words[0] if words else ''} must be the first argument")
    assert "recipes/RECIPE.py" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "srun.json").exists()


def test_a_folder_without_recipes_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    done = run_with_stubs(tmp_path, ["distill"])
    assert (done.returncode, (tmp_path / "srun.json").exists()) == (2, False)
    assert f"RECIPE=distill must be the first argument and a file recipes/RECIPE.py in {tmp_path};" in done.stderr


@pytest.mark.parametrize(("recipe", "last"), [("rank", ["rank.only=3"]), ("compress", [])])
def test_a_task_of_an_array_trains_the_candidate_of_its_number(tmp_path: Path, recipe: str, last: list[str]) -> None:
    assert run_with_stubs(tmp_path, [recipe, *OVERRIDES], SLURM_ARRAY_TASK_ID="3").returncode == 0
    record = json.loads((tmp_path / "python0.json").read_text())
    assert record["argv"][record["argv"].index(f"recipes.{recipe}") + 1 :] == [*OVERRIDES, *last]


@pytest.mark.parametrize("recipe", ["compress", "distill", "rank", "cache_teacher"])
def test_overrides_and_rendezvous_arrive_untouched(tmp_path: Path, recipe: str) -> None:
    done = run_with_stubs(tmp_path, [recipe, *OVERRIDES])
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "python0.json").read_text())
    # 10000 + 135791 % 20000, worked out by hand.
    assert record["argv"] == [
        "-m",
        "torch.distributed.run",
        "--nnodes=3",
        "--nproc-per-node=8",
        "--rdzv-id=135791",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=gpu01:25791",
        "-m",
        f"recipes.{recipe}",
        *OVERRIDES,
    ]
    assert (record["env"]["MASTER_ADDR"], record["env"]["MASTER_PORT"]) == ("gpu01", "25791")
    srun = json.loads((tmp_path / "srun.json").read_text())
    assert srun == ["--kill-on-bad-exit=1", "--cpu-bind=none", "--nodes=3", "--ntasks-per-node=1"]
    check = json.loads((tmp_path / "python0-check.json").read_text())["argv"]
    assert check == [word.replace(f"recipes.{recipe}", "recipes.check_nodes") for word in record["argv"]]


RECIPES = {path.stem for path in (ROOT / "recipes").glob("[a-z]*.py")}
WITHOUT_A_MODEL = {"compare", "compare_scores", "dashboard", "gate", "plan", "status", "submit", "verify"}


@pytest.mark.parametrize("recipe", sorted(RECIPES - {"check_nodes"}))
def test_a_recipe_without_a_model_is_one_process_and_every_other_is_checked_on_all_nodes(
    tmp_path: Path, recipe: str
) -> None:
    """Those without a model have settings of their own, so that `recipes.check_nodes` would refuse their overrides."""
    done = run_with_stubs(tmp_path, [recipe, *OVERRIDES])
    assert done.returncode == 0, done.stderr
    argv = json.loads((tmp_path / "python0.json").read_text())["argv"]
    has_model = recipe not in WITHOUT_A_MODEL
    nodes, ranks = (3, 8) if has_model else (1, 1)
    assert argv[2:4] == [f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
    assert json.loads((tmp_path / "srun.json").read_text())[2] == f"--nodes={nodes}"
    assert (tmp_path / "python0-check.json").exists() == has_model


def test_cpus_of_a_task_reach_srun(tmp_path: Path) -> None:
    assert run_with_stubs(tmp_path, ["distill"], SLURM_CPUS_PER_TASK="96").returncode == 0
    assert json.loads((tmp_path / "srun.json").read_text())[4:] == ["--cpus-per-task=96"]


def test_a_run_knows_the_end_of_its_job(tmp_path: Path) -> None:
    def end(**words: str) -> str | None:
        assert run_with_stubs(tmp_path, ["distill"], TZ="UTC", **words).returncode == 0
        told: str | None = json.loads((tmp_path / "python0.json").read_text())["env"]["SLURM_JOB_END_TIME"]
        return told

    assert end(ends="2026-11-26T17:19:58") == "1795713598"
    assert end(ends="2026-11-26T17:19:58", SLURM_JOB_END_TIME="7") == "7", "what Slurm itself says"
    assert end(ends="NONE") is end(ends="") is None, "a job without end"


def _environment(tmp_path: Path, **env: str) -> dict[str, str | None]:
    done = run_with_stubs(tmp_path, ["distill"], **env)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, str | None] = json.loads((tmp_path / "python0.json").read_text())["env"]
    return found


def test_devices_and_threads_are_set_and_nccl_is_not(tmp_path: Path) -> None:
    env = _environment(tmp_path, SLURM_CPUS_ON_NODE="96")
    assert (env["CUDA_DEVICE_MAX_CONNECTIONS"], env["OMP_NUM_THREADS"]) == ("1", "12")  # 96 CPUs, 8 ranks
    assert env["PYTORCH_ALLOC_CONF"] == env["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert env["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert env["NCCL_IB_HCA"] is None and env["NCCL_DEBUG"] is None
    assert _environment(tmp_path, SLURM_CPUS_ON_NODE="5")["OMP_NUM_THREADS"] == "1"
    assert _environment(tmp_path, SLURM_CPUS_ON_NODE="96", GPUS_PER_NODE="4")["OMP_NUM_THREADS"] == "24"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_exports_wins(tmp_path: Path, name: str) -> None:
    own = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "OMP_NUM_THREADS": "3", name: "max_split_size_mb:64"}
    env = _environment(tmp_path, SLURM_CPUS_ON_NODE="96", **own)
    assert (env["CUDA_DEVICE_MAX_CONNECTIONS"], env["OMP_NUM_THREADS"]) == ("8", "3")
    assert env["PYTORCH_ALLOC_CONF"] == env["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"


def test_modules_are_loaded_in_order(tmp_path: Path) -> None:
    profile = 'module() { printf "%s\\n" "$*" >>loaded; [[ "$2" != gone ]]; }; export -f module; exec bash "$@"'
    command = ["bash", "-c", profile, "shell", str(SCRIPT), "distill"]
    assert run_with_stubs(tmp_path, [], command=command, COMPACTLM_MODULES="cuda/13.0 nccl").returncode == 0
    assert (tmp_path / "loaded").read_text() == "load cuda/13.0\nload nccl\n"
    assert run_with_stubs(tmp_path, [], command=command, COMPACTLM_MODULES="gone nccl").returncode == 1
    assert (tmp_path / "loaded").read_text().endswith("load gone\n"), "a job without its modules does not go on"


def test_environment_sets_python_gpus_and_container(tmp_path: Path) -> None:
    other = write_script(tmp_path / "venv" / "my python", RECORDER, folder=str(tmp_path), prefix="venv")
    settings = {"COMPACTLM_PYTHON": str(other), "SLURM_GPUS_ON_NODE": "4", "CONTAINER_IMAGE": "image with space.sqsh"}
    done = run_with_stubs(tmp_path, ["distill", *OVERRIDES], **settings, CONTAINER_MOUNTS="/data:/data")
    assert done.returncode == 0, done.stderr
    assert "--nproc-per-node=4" in json.loads((tmp_path / "venv0.json").read_text())["argv"]
    assert json.loads((tmp_path / "srun.json").read_text())[4:] == [
        "--container-image=image with space.sqsh",
        f"--container-mounts={tmp_path}:{tmp_path},/data:/data",
        f"--container-workdir={tmp_path}",
    ]
    (tmp_path / "venv0.json").unlink()
    assert run_with_stubs(tmp_path, ["distill", *OVERRIDES], **settings, GPUS_PER_NODE="2").returncode == 0
    assert "--nproc-per-node=2" in json.loads((tmp_path / "venv0.json").read_text())["argv"]


def test_failure_of_a_rank_or_of_scontrol_fails_the_job(tmp_path: Path) -> None:
    assert run_with_stubs(tmp_path, ["distill", *OVERRIDES], COMPACTLM_PYTHON="/bin/false").returncode == 1
    assert run_with_stubs(tmp_path, ["distill", *OVERRIDES], SLURM_JOB_NODELIST="unknown").returncode == 7


ENDS = """#!{python}
import os, signal, sys
ignored = signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
if "recipes.check_nodes" not in sys.argv and {saved!r}:
    with open(os.environ["COMPACTLM_EXIT_FILE"], "w") as file:
        file.write({saved!r} + "\\n")
sys.exit(int({code!r}) if ignored else 9)
"""
"""A launcher that ends with a code, as torchrun does, after its main rank has written another."""


@pytest.mark.parametrize(
    ("saved", "code", "end", "is_requeued"),
    [
        ("75", "1", 75, True),
        ("138", "1", 138, True),
        ("143", "1", 143, False),
        ("", "1", 1, False),
        ("", "0", 0, False),
    ],
)
def test_a_run_that_saved_for_lack_of_time_is_requeued_and_no_other(
    tmp_path: Path, saved: str, code: str, end: int, is_requeued: bool
) -> None:
    python = write_script(tmp_path / "own" / "python", ENDS, saved=saved, code=code)
    env = {"COMPACTLM_PYTHON": str(python), "COMPACTLM_CHECK_NODES": "0"}
    assert run_with_stubs(tmp_path, ["distill"], **env).returncode == end
    assert (tmp_path / "requeued-135791").exists() == is_requeued
    assert not list(tmp_path.glob(".compactlm-*")), "the note of the exit code is gone"
    (tmp_path / "requeued-135791").unlink(missing_ok=True)
    assert run_with_stubs(tmp_path, ["distill"], **env, SLURM_RESTART_COUNT="100").returncode == end
    assert not (tmp_path / "requeued-135791").exists(), "not for ever"


def test_nodes_that_do_not_fit_together_end_the_job_before_the_recipe(tmp_path: Path) -> None:
    python = write_script(tmp_path / "own" / "python", ENDS, saved="75", code="2")
    assert run_with_stubs(tmp_path, ["distill"], COMPACTLM_PYTHON=str(python)).returncode == 2
    assert not (tmp_path / "requeued-135791").exists()


@pytest.mark.slow
def test_overrides_pass_through_the_real_launcher(tmp_path: Path) -> None:
    """torch.distributed.run parses its own options; the ranks' argv must still be the overrides."""
    write_script(tmp_path / "recipes" / "distill.py", RECORDER, folder=str(tmp_path), prefix="rank")
    (tmp_path / "recipes" / "__init__.py").touch()
    env = {"COMPACTLM_PYTHON": sys.executable, "GPUS_PER_NODE": "2", "SLURM_NNODES": "1", "COMPACTLM_CHECK_NODES": "0"}
    done = run_with_stubs(tmp_path, ["distill", *OVERRIDES], "localhost", **env)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        record = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert record["argv"] == OVERRIDES
        assert (record["env"]["RANK"], record["env"]["WORLD_SIZE"]) == (str(rank), "2")
