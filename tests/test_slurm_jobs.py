"""Real jobs of the batch script on a Slurm of two nodes, where that is installed: requeued, cancelled, in an array."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.slurm import OVERRIDES, RECORDER, ROOT, SCRIPT, recipes_in, write_script
from tests.support.slurm_cluster import job_facts, lose_node, return_node, slurm_cluster, start_soon, wait_for
from tests.support.stopped_runs import copy_artifacts, equal_weights, held, logged_steps, wait_for_pending
from tests.support.tiny_run import command, make_inputs, metrics

PIPELINE_SECONDS = 600
"""Longest wait for part of a tiny run: minutes where other work takes the cores, yet a test that hangs still ends."""


@pytest.fixture
def slurm_env(tmp_path: Path) -> Iterator[dict[str, str]]:
    with slurm_cluster(tmp_path) as env:
        yield env


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


def _cluster_env(tmp_path: Path, slurm_env: dict[str, str]) -> dict[str, str]:
    """Return the environment of jobs with one rank a node."""
    recipes_in(tmp_path)
    # No name service here knows the nodes; their names are replaced on the way to the real launcher.
    python = write_script(tmp_path / "python", '#!/usr/bin/env bash\nexec {python} "${{@/n[12]:/127.0.0.1:}}"\n')
    env = slurm_env | {"COMPACTLM_PYTHON": str(python), "GPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    return env | {"PYTHONPATH": str(ROOT)}


def _prepared(tmp_path: Path, *settings: str, ranks: int = 1) -> tuple[Path, Path, list[str]]:
    """Return a finished run, one that lacks the distillation, and the words after `sbatch` for that.

    No checkpoint is due on the way.
    """
    inputs, whole, run = make_inputs(tmp_path / "inputs"), tmp_path / "whole", tmp_path / "run"
    size = ["distill.steps=300", "distill.checkpoint_every=1000", *settings]
    for recipe in ("import_model", "tokenize", "score", "search", "prune", "distill"):
        done = commands.run(command(inputs, whole, *size, recipe=recipe), ranks=ranks)
        assert done.returncode == 0, done.stderr
    copy_artifacts(whole, run)
    return whole, run, [str(SCRIPT), "distill", *command(inputs, run, *size)[2:]]


def _submit(cwd: Path, env: dict[str, str], *words: str) -> str:
    """Return the number of a submitted job."""
    line = ["sbatch", "--parsable", *words]
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, check=True).stdout.strip()


def _has_ended(job: str, env: dict[str, str], state: str = "COMPLETED") -> bool:
    """Whether a job has ended; it must have done so in this state."""
    found = job_facts(job, env)["JobState"]
    assert found in (state, "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SIGNALING"), (
        f"job {job}: {found}"
    )
    return found == state


@pytest.mark.slow
def test_a_job_that_loses_either_of_its_nodes_goes_on_to_equal_weights(
    tmp_path: Path, slurm_env: dict[str, str]
) -> None:
    """Tensor parallel across two nodes: first the second node is lost, then the one with the batch script."""
    env = _cluster_env(tmp_path, slurm_env)
    whole, run, words = _prepared(tmp_path, "parallel.tp=2", ranks=2)
    job = _submit(tmp_path, env, "--nodes=2", *words, "distill.checkpoint_every=20")
    for times, node in enumerate(("n2", "n1"), start=1):
        done = logged_steps(run)
        wait_for(lambda: logged_steps(run) >= done + 30, tmp_path, "steps and a checkpoint", PIPELINE_SECONDS)  # noqa: B023
        with held(run):
            assert job_facts(job, env)["BatchHost"] == "n1"
            lose_node(node, env)
        assert not (run / "distill" / "manifest.json").exists(), "lost too late to show anything"
        wait_for(lambda: job_facts(job, env)["JobState"] == "PENDING", tmp_path / "s", "requeued job", 180)
        return_node(node, env)
        start_soon(job, tmp_path, env)
        wait_for(lambda: job_facts(job, env)["Restarts"] == str(times), tmp_path / "s", "next start", 60)  # noqa: B023
    wait_for(lambda: _has_ended(job, env), tmp_path / "s", "end", PIPELINE_SECONDS)
    assert metrics(run) == metrics(whole)
    assert equal_weights(run / "distill", whole / "distill")


@pytest.mark.slow
def test_a_chain_of_jobs_whose_time_runs_out_goes_on_to_equal_weights(
    tmp_path: Path, slurm_env: dict[str, str]
) -> None:
    """Job 1 is warned by Slurm and requeued, then has too little time for all steps; job 2 ends the run."""
    env = _cluster_env(tmp_path, slurm_env) | {"COMPACTLM_CHECK_NODES": "0", "COMPACTLM_RESTARTS": "1"}
    whole, run, words = _prepared(tmp_path)
    options = ["--nodes=1", "--time=10", "--job-name=chain", "--dependency=singleton", "--signal=B:USR1@90"]
    jobs = [_submit(tmp_path, env, *options, *words) for _ in range(3)]

    def log(job: str) -> str:
        return (tmp_path / f"chain-{job}.out").read_text()

    start = time.monotonic()
    wait_for(lambda: logged_steps(run) >= 3, tmp_path, "steps", PIPELINE_SECONDS)
    with held(run) as rank:
        minutes = 2 + int(time.monotonic() - start) // 60  # one or two are left
        subprocess.run(["scontrol", "update", f"JobId={jobs[0]}", f"TimeLimit={minutes}"], env=env, check=True)
        wait_for_pending(rank, signal.SIGUSR1, 90)
    wait_for(lambda: job_facts(jobs[0], env)["JobState"] == "PENDING", tmp_path, "requeued job", 120)
    assert "stopped: distill: SIGUSR1: " in log(jobs[0]) and "requeued: the run ended with code 138" in log(jobs[0])
    saved = logged_steps(run)
    assert saved < 100, "enough steps are left for the next starts"
    assert [job_facts(job, env)["Reason"] for job in jobs[1:]] == ["Dependency"] * 2
    subprocess.run(["scontrol", "update", f"JobId={jobs[0]}", "TimeLimit=1"], env=env, check=True)
    start_soon(jobs[0], tmp_path, env)
    wait_for(lambda: _has_ended(jobs[0], env, "FAILED"), tmp_path, "end of job 1", PIPELINE_SECONDS)
    # A start that is slow enough listens before Slurm's warning comes; both save what is done and end.
    ends = {"75:0": "the job's time is nearly up", "138:0": "stopped: distill: SIGUSR1: "}
    assert ends[job_facts(jobs[0], env)["ExitCode"]] in log(jobs[0])
    for job in jobs[1:]:
        wait_for(lambda: _has_ended(job, env), tmp_path, f"end of job {job}", PIPELINE_SECONDS)  # noqa: B023
    assert "distill: done before, skipped" in log(jobs[2])
    assert metrics(run) == metrics(whole)
    assert equal_weights(run / "distill", whole / "distill")


@pytest.mark.slow
def test_an_array_with_a_failing_task_ranks_all_once_that_is_mended(tmp_path: Path, slurm_env: dict[str, str]) -> None:
    """Two tasks side by side, each a candidate; the last job names the one that fails; the ranking is one process's."""
    env = _cluster_env(tmp_path, slurm_env)
    inputs, run, alone = make_inputs(tmp_path / "inputs"), tmp_path / "run", tmp_path / "alone"
    extra = ["search.ffn=[32,48]", "rank.candidates=2", "rank.steps=2"]
    assert commands.run(command(inputs, alone, *extra, recipe="rank")).returncode == 0
    copy_artifacts(alone, run, ("teacher", "tokens", "score", "search"))
    (run / "rank").mkdir()
    (run / "rank" / "1").write_text("in the way of a folder")
    words = ["--nodes=1", str(SCRIPT), "rank", *command(inputs, run, *extra)[2:]]
    array = _submit(tmp_path, env, "--array=0-1", *words)
    last = _submit(tmp_path, env, f"--dependency=afterany:{array}", *words)
    wait_for(lambda: _has_ended(last, env, "FAILED"), tmp_path, "end of the last job", PIPELINE_SECONDS)
    assert [job_facts(f"{array}_{task}", env)["JobState"] for task in (0, 1)] == ["COMPLETED", "FAILED"]
    log = (tmp_path / f"compactlm-{last}.out").read_text()
    assert f"error: {run}/rank/1: File exists" in log and "distill ..." not in log, "candidate 0 is trained, 1 is named"
    assert not (run / "rank" / "ranking.json").exists()
    (run / "rank" / "1").unlink()
    last = _submit(tmp_path, env, *words)
    wait_for(lambda: _has_ended(last, env), tmp_path, "ranking", PIPELINE_SECONDS)
    assert json.loads((run / "rank" / "ranking.json").read_text()) == json.loads(
        (alone / "rank" / "ranking.json").read_text()
    )
    assert all(equal_weights(run / "rank" / name / "distill", alone / "rank" / name / "distill") for name in "01")


@pytest.mark.slow
def test_a_job_that_is_warned_of_its_end_or_cancelled_goes_on_to_equal_weights(
    tmp_path: Path, slurm_env: dict[str, str]
) -> None:
    """USR1 to the batch script, as before a time limit: saved and requeued. `scancel`: saved. A third job ends."""
    env = _cluster_env(tmp_path, slurm_env)
    whole, run, words = _prepared(tmp_path)

    def submit() -> str:
        return _submit(tmp_path, env, "--nodes=1", "--dependency=singleton", "--job-name=chain", *words)

    def log() -> str:
        return "".join(path.read_text() for path in sorted(tmp_path.glob("chain-*.out")))

    first = submit()
    wait_for(lambda: logged_steps(run) >= 3, tmp_path, "steps", PIPELINE_SECONDS)
    with held(run) as rank:
        subprocess.run(["scancel", "--batch", "--signal=USR1", first], env=env, check=True)
        wait_for_pending(rank, signal.SIGUSR1, 120)
    start_soon(first, tmp_path, env)
    assert "1 ranks on 1 nodes are alike" in log()
    assert "stopped: distill: SIGUSR1: " in log() and "requeued: the run ended with code 138" in log()
    saved = logged_steps(run)
    assert saved < 100, "enough steps are left for the second start"
    wait_for(lambda: logged_steps(run) >= saved + 3, tmp_path, "steps of the second start", PIPELINE_SECONDS)
    with held(run):  # Slurm wakes those that it ends
        subprocess.run(["scancel", first], env=env, check=True)
        wait_for(lambda: job_facts(first, env)["JobState"] == "CANCELLED", tmp_path, "cancelled job", 120)
    second = submit()
    wait_for(lambda: job_facts(second, env)["JobState"] == "COMPLETED", tmp_path, "end", PIPELINE_SECONDS)
    assert "stopped: distill: SIGTERM: " in log()
    assert metrics(run) == metrics(whole)
    assert equal_weights(run / "distill", whole / "distill")
