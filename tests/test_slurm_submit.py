"""`recipes.submit` and `recipes.status` on a real Slurm, where that is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.slurm import ROOT, recipes_in, write_script
from tests.support.slurm_cluster import job_facts, slurm_cluster, wait_for
from tests.support.stopped_runs import held, logged_steps
from tests.support.tiny_run import command, make_inputs, metrics

SECONDS = 600
"""Longest wait for a job that computes: minutes where other work takes the cores."""


@pytest.mark.slow
def test_a_chain_is_submitted_for_a_site_its_status_is_told_and_it_ends(tmp_path: Path) -> None:
    run, inputs = tmp_path / "a run 50%", make_inputs(tmp_path / "inputs")
    recipes_in(tmp_path)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    # No name service here knows the nodes; their names are replaced on the way to the real launcher.
    python = write_script(tmp_path / "python", '#!/usr/bin/env bash\nexec {python} "${{@/n[12]:/127.0.0.1:}}"\n')
    site = [
        "site.partition=all",
        "site.gpus_per_node=1",
        f"site.python={python}",
        f"site.environment.PYTHONPATH={ROOT}",
    ]
    words = command(inputs, run, "distill.steps=100", "distill.checkpoint_every=50")[2:]
    with slurm_cluster(tmp_path) as env:
        env = {name: value for name, value in env.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

        def status() -> list[str]:
            done = commands.run(["-m", "recipes.status", f"run.dir={run}"], cwd=tmp_path, env=env)
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        submit = ["-m", "recipes.submit", "compress", "time=1:00:00", *site, *words]
        refused = commands.run([*submit, "site.partition=none"], cwd=tmp_path, env=env)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith("error: sbatch: sbatch: error: invalid partition specified: none")
        done = commands.run([*submit, "chain=2"], cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        logs = dict(re.findall(r"^job (\d+): log in (.*)$", done.stdout, re.MULTILINE))
        first, second = logs
        wait_for(lambda: logged_steps(run) >= 3, tmp_path, "steps", SECONDS)
        with held(run) as rank:
            told = status()
        (training,) = (line for line in told if line.startswith("distill: "))
        assert re.match(r"distill: step \d+ of 100, [\d,]+ of 6,400 tokens, loss \d", training)
        assert f"at work: process {rank} on " in "\n".join(told) and f", job {first}, since " in "\n".join(told)
        assert re.search(
            rf"^job {first} \(compress-a_run_50_\): running on 1 nodes, \d+:\d+ left$", "\n".join(told), re.M
        )
        assert f"job {second} (compress-a_run_50_): pending on 1 nodes, Dependency, start N/A" in told
        wait_for(lambda: job_facts(second, env)["JobState"] == "COMPLETED", tmp_path, "end", SECONDS)
        assert job_facts(first, env)["JobState"] == "COMPLETED"
        assert "distill ..." in Path(logs[first]).read_text()
        assert "distill: done before, skipped" in Path(logs[second]).read_text()
        assert status()[-1] == "nobody works here" and "distill: done " in "\n".join(status())
        verify = commands.run(
            ["-m", "recipes.submit", "verify", "site.gpus_per_node=1", *site, f"run.dir={run}"], cwd=tmp_path, env=env
        )
        assert verify.returncode == 0, verify.stderr
        ((job, log),) = re.findall(r"^job (\d+): log in (.*)$", verify.stdout, re.MULTILINE)
        wait_for(lambda: job_facts(job, env)["JobState"] == "COMPLETED", tmp_path, "end of verify", SECONDS)
        assert f"{run}/distill: " in Path(log).read_text() and "damaged" not in Path(log).read_text()
    assert [line["step"] for line in metrics(run)] == list(range(100))


@pytest.mark.slow
def test_a_sweep_is_submitted_as_jobs_and_an_array_finds_it_done(tmp_path: Path) -> None:
    """Jobs of `recipes.submit --multirun`; then the sweep through a launcher, each run a task of an array."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run, inputs = tmp_path / "run", make_inputs(tmp_path / "inputs")
    recipes_in(tmp_path)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    python = write_script(tmp_path / "python", '#!/usr/bin/env bash\nexec {python} "${{@/n[12]:/127.0.0.1:}}"\n')
    site = [
        "site.partition=all", "site.gpus_per_node=1", f"site.python={python}",
        f"site.environment.PYTHONPATH={ROOT}",
    ]  # fmt: skip
    words = [*command(inputs, run, "distill.lr=1e-3,3e-3")[2:], "--multirun"]
    folders = [run / f"distill.lr={lr}" for lr in ("0.001", "0.003")]
    with slurm_cluster(tmp_path) as env:
        env = env | {"OMP_NUM_THREADS": "1"}
        submitted = commands.run(["-m", "recipes.submit", "compress", *site, *words], cwd=tmp_path, env=env)
        assert submitted.returncode == 0, submitted.stderr
        logs = dict(re.findall(r"^job (\d+): log in (.*)$", submitted.stdout, re.MULTILINE))
        assert len(logs) == 2
        for job, log in logs.items():
            wait_for(lambda job=job: job_facts(job, env)["JobState"] == "COMPLETED", tmp_path, Path(log), SECONDS)
        assert [Path(log).read_text().count("Runs of") for log in logs.values()] == [1, 1], "a table at the end alone"
        written = [folder / "export" / "hf" / "model.safetensors" for folder in folders]
        times = [path.stat().st_mtime_ns for path in written]
        launcher = [
            "hydra/launcher=submitit_slurm", "hydra.launcher.partition=all", "hydra.launcher.timeout_min=60",
            "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=null",
        ]  # fmt: skip
        again = ["-m", "recipes.compress", *words, *launcher]
        done = commands.run(again, cwd=tmp_path, env=env | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        refused = commands.run([*again, "hydra.launcher.partition=none"], cwd=tmp_path, env=env)
        assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith(
            "error: a job of the sweep failed"
        )
    tasks = sorted(path.name for path in (run / ".submitit").glob("*_*") if path.is_dir())
    assert [name.partition("_")[2] for name in tasks] == ["0", "1"] and len(
        {name.partition("_")[0] for name in tasks}
    ) == 1
    assert [path.stat().st_mtime_ns for path in written] == times, "nothing was made again"
    table = (run / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + 2 and all("done" in row for row in table[2:])
