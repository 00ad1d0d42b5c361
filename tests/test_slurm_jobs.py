"""Real jobs of the batch script on a Slurm of two nodes, where that is installed: requeued, cancelled, in an array."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.slurm import OVERRIDES, RECORDER, ROOT, SCRIPT, recipes_in, write_script
from tests.support.slurm_cluster import job_facts, slurm_cluster, start_soon, wait_for
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
    wait_for(
        lambda: (run / "progress" / "distill" / "checkpoints" / "latest.json").exists(),
        tmp_path,
        "checkpoint",
        PIPELINE_SECONDS,
    )
    subprocess.run(["scontrol", "requeue", job], env=env, check=True)
    assert not (run / "distill" / "manifest.json").exists(), "requeued too late to show anything"
    start_soon(job, tmp_path, env)
    wait_for(lambda: (run / "report" / "manifest.json").exists(), tmp_path, "report", PIPELINE_SECONDS)
    assert job_facts(job, env)["Restarts"] == "1"
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


def _prepared(tmp_path: Path, slurm_env: dict[str, str]) -> tuple[Path, Path, list[str], dict[str, str]]:
    """Return a finished run, one that lacks the distillation, the words after `sbatch` for that, and its environment.

    No checkpoint is due on the way.
    """
    inputs, whole, run = make_inputs(tmp_path / "inputs"), tmp_path / "whole", tmp_path / "run"
    recipes_in(tmp_path)
    size = ["distill.steps=300", "distill.checkpoint_every=1000"]
    for recipe in ("import_model", "tokenize", "score", "search", "prune", "distill"):
        done = commands.run(command(inputs, whole, *size, recipe=recipe))
        assert done.returncode == 0, done.stderr
    copy_artifacts(whole, run)
    python = write_script(tmp_path / "python", '#!/usr/bin/env bash\nexec {python} "${{@/n[12]:/127.0.0.1:}}"\n')
    env = slurm_env | {"COMPACTLM_PYTHON": str(python), "GPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    return whole, run, [str(SCRIPT), "distill", *command(inputs, run, *size)[2:]], env | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_job_that_is_warned_of_its_end_or_cancelled_goes_on_to_equal_weights(
    tmp_path: Path, slurm_env: dict[str, str]
) -> None:
    """USR1 to the batch script, as before a time limit: saved and requeued. `scancel`: saved. A third job ends."""
    whole, run, words, env = _prepared(tmp_path, slurm_env)

    def submit() -> str:
        line = ["sbatch", "--parsable", "--nodes=1", "--dependency=singleton", "--job-name=chain", *words]
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.strip()

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
