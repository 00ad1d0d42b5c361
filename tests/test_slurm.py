"""The batch script: syntax, its recipe, arguments that arrive untouched, and real jobs where Slurm is installed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.slurm import OVERRIDES, RECORDER, ROOT, SCRIPT, recipes_in, run_with_stubs, write_script
from tests.support.tiny_run import command, make_inputs

PIPELINE_SECONDS = 600
"""Longest wait for part of a tiny run: minutes where other work takes the cores, yet a test that hangs still ends."""


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


def _environment(tmp_path: Path, **env: str) -> dict[str, str | None]:
    done = run_with_stubs(tmp_path, ["distill"], **env)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, str | None] = json.loads((tmp_path / "python0.json").read_text())["env"]
    return found


def test_devices_and_threads_are_set_and_nccl_is_not(tmp_path: Path) -> None:
    env = _environment(tmp_path, SLURM_CPUS_ON_NODE="96")
    assert (env["CUDA_DEVICE_MAX_CONNECTIONS"], env["OMP_NUM_THREADS"]) == ("1", "12")  # 96 CPUs, 8 ranks
    assert env["PYTORCH_ALLOC_CONF"] == env["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert env["NCCL_IB_HCA"] is None and env["NCCL_DEBUG"] is None
    assert _environment(tmp_path, SLURM_CPUS_ON_NODE="5")["OMP_NUM_THREADS"] == "1"
    assert _environment(tmp_path, SLURM_CPUS_ON_NODE="96", GPUS_PER_NODE="4")["OMP_NUM_THREADS"] == "24"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_exports_wins(tmp_path: Path, name: str) -> None:
    own = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "OMP_NUM_THREADS": "3", name: "max_split_size_mb:64"}
    env = _environment(tmp_path, SLURM_CPUS_ON_NODE="96", **own)
    assert (env["CUDA_DEVICE_MAX_CONNECTIONS"], env["OMP_NUM_THREADS"]) == ("8", "3")
    assert env["PYTORCH_ALLOC_CONF"] == env["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"


def test_the_sites_file_comes_between_the_user_and_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    lines = [
        "# of this cluster",
        "",
        "NCCL_IB_HCA=mlx5_0:1,mlx5_1:1",
        "NCCL_DEBUG=WARN=$HOME `id`",
        "not a line",
        "OMP_NUM_THREADS=7",
    ]
    (tmp_path / "slurm" / "site.env").write_text("\n".join(lines))  # without an end of the last line
    env = _environment(tmp_path, SLURM_CPUS_ON_NODE="96", NCCL_IB_HCA="mlx5_9")
    assert (env["NCCL_IB_HCA"], env["NCCL_DEBUG"], env["OMP_NUM_THREADS"]) == ("mlx5_9", "WARN=$HOME `id`", "7")


def test_the_example_of_a_sites_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    shutil.copyfile(ROOT / "slurm" / "site.env.example", tmp_path / "slurm" / "site.env")
    env = _environment(tmp_path)
    assert (env["NCCL_IB_HCA"], env["NCCL_DEBUG"]) == ("mlx5", "WARN")


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


@pytest.mark.slow
def test_overrides_pass_through_the_real_launcher(tmp_path: Path) -> None:
    """torch.distributed.run parses its own options; the ranks' argv must still be the overrides."""
    write_script(tmp_path / "recipes" / "distill.py", RECORDER, folder=str(tmp_path), prefix="rank")
    (tmp_path / "recipes" / "__init__.py").touch()
    env = {"COMPACTLM_PYTHON": sys.executable, "GPUS_PER_NODE": "2", "SLURM_NNODES": "1"}
    done = run_with_stubs(tmp_path, ["distill", *OVERRIDES], "localhost", **env)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        record = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert record["argv"] == OVERRIDES
        assert (record["env"]["RANK"], record["env"]["WORLD_SIZE"]) == (str(rank), "2")


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 Gres=gpu:8
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _missing_for_slurm() -> str:
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root to start Slurm's daemons"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    programs = ("sbatch", "srun", "scontrol", "sinfo", "munged", "slurmctld", "slurmd")
    missing = [name for name in programs if not shutil.which(name, path=path)]
    return f"needs Slurm and munge installed; missing: {', '.join(missing)}" if missing else ""


@pytest.fixture
def slurm_env(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A munged, a slurmctld and two slurmd of this test alone; yields the environment that clients need."""
    reason = _missing_for_slurm()
    if reason:
        pytest.skip(reason)
    folder = tmp_path / "s"
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=socket.gethostname().split(".")[0], folder=folder, ports=_free_ports(3)))
    # Plain files stand for the GPUs: slurmd counts them and never opens them.
    for gpu in range(8):
        (folder / f"gpu{gpu}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    env = os.environ | {"SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    munge = [f"--{name}={folder}/munge.{end}" for name, end in (("key-file", "key"), ("socket", "socket"))]
    munge += [f"--{name}={folder}/munge.{end}" for name, end in (("pid-file", "pid"), ("log-file", "log"))]
    commands = [
        ["munged", "--foreground", "--force", *munge, f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf), "-N", "n1"],
        ["slurmd", "-D", "-f", str(conf), "-N", "n2"],
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / "daemons.log").open("ab") as log:
                daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            if command[0] == "munged":
                _wait_for(lambda: (folder / "munge.socket").exists(), folder, "munged")
        _wait_for(lambda: _idle_nodes(env) == 2, folder, "two idle nodes")
        yield env
    finally:
        if len(daemons) == len(commands):  # a test that failed leaves no job behind
            subprocess.run(["scancel", "--partition=all"], env=env, capture_output=True, timeout=60)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _wait_for(holds: Callable[[], bool], folder: Path, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in folder.glob("*.log"))
            pytest.fail(f"no {what} within {seconds:g} s\n{logs}")
        time.sleep(0.2)


def _idle_nodes(env: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    return done.stdout.split().count("idle")


@pytest.mark.slow
def test_two_node_job_on_a_real_slurm(tmp_path: Path, slurm_env: dict[str, str]) -> None:
    stub = write_script(tmp_path / "venv" / "python", RECORDER, folder=str(tmp_path), prefix="node")
    recipes_in(tmp_path)
    done = subprocess.run(
        ["sbatch", "--wait", "--parsable", "--nodes=2", str(SCRIPT), "distill", *OVERRIDES],
        cwd=tmp_path,
        env=slurm_env | {"COMPACTLM_PYTHON": str(stub)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = "".join(path.read_text() for path in tmp_path.glob("compactlm-*.out"))
    assert done.returncode == 0, done.stderr + output
    job_id = done.stdout.strip()
    records = [json.loads((tmp_path / f"node{rank}.json").read_text()) for rank in range(2)]
    port = str(10000 + int(job_id) % 20000)
    for rank, record in enumerate(records):
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=8", f"--rdzv-id={job_id}"]
        launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=n1:{port}", "-m", "recipes.distill"]
        assert record["argv"] == [*launcher, *OVERRIDES]
        env = record["env"]
        assert (env["SLURM_PROCID"], env["SLURMD_NODENAME"], env["SLURM_NNODES"]) == (str(rank), f"n{rank + 1}", "2")
        assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["SLURM_JOB_ID"]) == ("n1", port, job_id)
    words = ["sbatch", "--wait", "--job-name=forgotten", str(SCRIPT), *OVERRIDES]
    assert subprocess.run(words, cwd=tmp_path, env=slurm_env, capture_output=True, timeout=120).returncode == 2
    (log,) = tmp_path.glob("forgotten-*.out")
    assert log.read_text().startswith(f"error: RECIPE={OVERRIDES[0]} must be")


@pytest.mark.slow
def test_a_requeued_job_on_two_nodes_goes_on_to_the_end(tmp_path: Path, slurm_env: dict[str, str]) -> None:
    """The real recipe, one rank a node, tensor parallel across nodes; requeued by hand in the middle of training."""
    inputs, run = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    recipes_in(tmp_path)
    # No name service here knows the nodes; their names are replaced on the way to the real launcher.
    python = write_script(tmp_path / "python", '#!/usr/bin/env bash\nexec {python} "${{@/n1:/127.0.0.1:}}"\n')
    overrides = command(inputs, run, "parallel.tp=2", "distill.steps=40")[2:]
    submit = ["sbatch", "--parsable", "--nodes=2", str(SCRIPT), "compress", *overrides]
    env = slurm_env | {"COMPACTLM_PYTHON": str(python), "GPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT)}
    job = subprocess.run(submit, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.strip()
    _wait_for(
        lambda: (run / "progress" / "distill" / "checkpoints" / "latest.json").exists(),
        tmp_path,
        "checkpoint",
        PIPELINE_SECONDS,
    )
    subprocess.run(["scontrol", "requeue", job], env=env, check=True)
    assert not (run / "distill" / "manifest.json").exists(), "requeued too late to show anything"
    # Slurm lets a requeued job wait two minutes; a test need not.
    _wait_for(lambda: _job(job, env)["JobState"] == "PENDING", tmp_path, "requeued job", 60)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=env, check=True)
    _wait_for(lambda: (run / "report" / "manifest.json").exists(), tmp_path, "report", PIPELINE_SECONDS)
    assert _job(job, env)["Restarts"] == "1"
    log = "".join(path.read_text() for path in tmp_path.glob("compactlm-*.out"))
    assert "score: done before, skipped" in log, "the second start skipped what the first had finished"
    steps = [json.loads(line)["step"] for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(40))


@pytest.mark.slow
def test_an_array_trains_the_candidates_and_a_last_job_ranks_them(tmp_path: Path, slurm_env: dict[str, str]) -> None:
    """The real recipe: two tasks side by side, each a candidate; the ranking is that of one process."""
    inputs, run = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    recipes_in(tmp_path)
    python = write_script(tmp_path / "python", '#!/usr/bin/env bash\nexec {python} "${{@/n[12]:/127.0.0.1:}}"\n')
    extra = ["search.ffn=[32,48]", "rank.candidates=2", "rank.steps=2"]
    env = slurm_env | {"COMPACTLM_PYTHON": str(python), "GPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT)}
    for recipe in ("import_model", "tokenize", "score", "search"):
        assert commands.run(command(inputs, run, *extra, recipe=recipe)).returncode == 0
    submit = [str(SCRIPT), "rank", *command(inputs, run, *extra)[2:]]
    for options in (["--array=0-1"], []):
        words = ["sbatch", "--wait", "--nodes=1", *options, *submit]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PIPELINE_SECONDS)
        log = "".join(path.read_text() for path in tmp_path.glob("compactlm-*.out"))
        assert done.returncode == 0, done.stderr + log
        assert (run / "rank" / "ranking.json").exists() == (not options)
    assert log.count("distill ...") == 2, "the last job found both trained"
    ranking = json.loads((run / "rank" / "ranking.json").read_text())
    assert sorted(entry["candidate"] for entry in ranking) == [0, 1]


def _job(job: str, env: dict[str, str]) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", job], env=env, capture_output=True, text=True, check=True).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)
