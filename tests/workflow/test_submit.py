"""`recipes.submit`: checked settings become jobs, wrong ones one line; what is printed is what is submitted."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF, SUBMIT, compose_root, group_names
from compactlm_nemo.config.submit import TIME, SubmitConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.workflow.submit import job_script, split_words
from tests.support import commands
from tests.support.slurm import recipes_in, write_script
from tests.support.tiny_run import command

SBATCH = """#!{python}
import json, os, sys
from pathlib import Path
folder = Path({folder!r})
number = 101 + len(list(folder.glob("sbatch-*.json")))
if "--partition=closed" in sys.argv:
    sys.exit("sbatch: error: invalid partition specified: closed")
names = ["NCCL_DEBUG", "CONTAINER_IMAGE", "CONTAINER_MOUNTS", "COMPACTLM_PYTHON", "COMPACTLM_MODULES", "GPUS_PER_NODE"]
record = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": {{name: os.environ.get(name) for name in names}}}}
(folder / f"sbatch-{{number}}.json").write_text(json.dumps(record))
print(f"{{number}};cluster")
"""
SITE = [
    "site.partition=batch",
    "site.account=mine",
    "site.gpus_per_node=1",
    "site.container=image of mine.sqsh",
    "site.mounts=[/data:/data,/models:/m]",
    "site.modules=[cuda/13.0,nccl]",
    "site.python=/opt/my python",
    "site.environment.NCCL_DEBUG=WARN",
    "site.environment.OTHER='$HOME `id`'",
    'site.options=["--qos=long"]',
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder to submit from, with a stub of sbatch."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    recipes_in(folder)
    (folder / "slurm").symlink_to(CONF.parent / "slurm")
    write_script(tmp_path / "bin" / "sbatch", SBATCH, folder=str(tmp_path))
    return folder


def _submit(checkout: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout.parent}/bin:{os.environ['PATH']}"
    return commands.run(["-m", "recipes.submit", *words], cwd=checkout, env={**os.environ, "PATH": path, **env})


def _records(checkout: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(checkout.parent.glob("sbatch-*.json"))]


def test_a_chain_of_jobs_gets_the_site_and_the_recipe_its_overrides(inputs: Path, checkout: Path) -> None:
    run = checkout.parent / "a run 50%"
    words = command(inputs, run, "wandb.mode=offline", "wandb.project=mine", "nodes=2")[2:]
    done = _submit(checkout, "compress", "time=1-00", "chain=3", *SITE, *words)
    assert done.returncode == 0, done.stderr
    records = _records(checkout)
    options = [
        "--job-name=compress-a_run_50_", "--nodes=2", "--time=1-00", "--gpus-per-node=1",
        f"--output={checkout.parent}/a run 50%%/jobs/compress-a_run_50_-%j.out", f"--comment={run}",
        "--partition=batch", "--account=mine", "--qos=long",
    ]  # fmt: skip
    for record, after in zip(records, ([], ["--dependency=afterany:101"], ["--dependency=afterany:102"]), strict=True):
        assert record["argv"] == [
            "--parsable",
            "--export=ALL",
            *after,
            *options,
            "slurm/run.sbatch",
            "compress",
            *words,
        ]
        assert record["cwd"] == str(checkout)
        assert record["env"] == {
            "NCCL_DEBUG": "WARN", "CONTAINER_IMAGE": "image of mine.sqsh", "CONTAINER_MOUNTS": "/data:/data,/models:/m",
            "COMPACTLM_PYTHON": "/opt/my python", "COMPACTLM_MODULES": "cuda/13.0 nccl", "GPUS_PER_NODE": "1",
        }  # fmt: skip
    logs = [f"job {job}: log in {run}/jobs/compress-a_run_50_-{job}.out" for job in (101, 102, 103)]
    assert done.stdout.splitlines() == [
        *logs,
        "W&B: offline, mine, run a run 50%, group a run 50%",
        f"status: python -m recipes.status 'run.dir={run}'",
    ]


def test_a_dry_run_prints_the_script_that_would_submit_and_its_words_survive_a_shell(
    inputs: Path, checkout: Path
) -> None:
    run, odd = checkout.parent / "run", "wandb.name='it\\'s $HOME `id`'"
    words = command(inputs, run, odd, recipe="distill")[2:]
    done = _submit(checkout, "distill", *SITE, *words, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert not _records(checkout) and not run.exists()
    path = f"{checkout.parent}/bin:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "NCCL_DEBUG": "INFO"}
    by_hand = subprocess.run(["bash"], input=done.stdout, env=env, capture_output=True, text=True)
    assert (by_hand.returncode, by_hand.stdout) == (0, "101\n"), by_hand.stderr
    (record,) = _records(checkout)
    assert record["argv"][-len(words) :] == words  # type: ignore[index]
    assert record["env"]["NCCL_DEBUG"] == "INFO", "what is exported wins"  # type: ignore[index]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["distill.lr=-1"], "distill.lr=-1"),
        (["nodes=3"], "distill.global_batch=4 must be a multiple of data-parallel ranks 3"),
        (["nodes=0"], "nodes=0 must be > 0"),
        (["time=soon"], "time=soon is no time limit of Slurm"),
        (["site=nowhere"], "site/nowhere"),
        (["nodez=1"], "nodez"),
        (["cluster=h100_sxm"], "site.gpus_per_node=1 must be cluster.devices_per_node=8 of H100 SXM"),
        (["data.train.a=gone.jsonl"], "data.train.a.path=gone.jsonl"),
        (["site.partition=closed"], "sbatch: sbatch: error: invalid partition specified: closed;"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_wrong_settings_are_one_line_and_nothing_is_submitted(
    inputs: Path, checkout: Path, words: list[str], told: str
) -> None:
    recipe = command(inputs, checkout.parent / "run", "site.gpus_per_node=1")[2:]
    done = _submit(checkout, "compress", *recipe, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and told in done.stderr and done.stderr.count("\n") == 1
    assert not _records(checkout)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rank"], "rank.candidates=0 trains no candidate"),
        (["nothing"], "RECIPE=nothing must be the first word, one of cache_teacher, "),
        (["submit"], "RECIPE=submit must be the first word"),
        (["run.dir=x"], "RECIPE=run.dir=x must be the first word"),
    ],
    ids=lambda words: " ".join(words),
)
def test_what_only_the_recipe_knows_is_checked_too(inputs: Path, checkout: Path, words: list[str], told: str) -> None:
    recipe = command(inputs, checkout.parent / "run", "site.gpus_per_node=1")[2:]
    done = _submit(checkout, *words, *recipe)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1
    assert not _records(checkout)


def test_a_recipe_without_a_model_is_submitted_as_well(checkout: Path) -> None:
    done = _submit(checkout, "verify", "run.dir=absent")
    assert done.returncode == 2 and "run.dir=absent holds no run" in done.stderr
    done = _submit(checkout, "verify", "run.dir=absent", "nodes=2")
    assert done.returncode == 2 and "nodes" in done.stderr, "it is one process"
    (checkout / "run" / "score").mkdir(parents=True)
    done = _submit(checkout, "verify", "run.dir=run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"job 101: log in {checkout}/jobs/verify-checkout-101.out\n"


def test_another_folder_than_the_checkout_is_refused(inputs: Path, tmp_path: Path) -> None:
    done = commands.run(
        ["-m", "recipes.submit", "compress", *command(inputs, tmp_path / "run")[2:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CONF.parent)},
    )
    assert done.returncode == 2 and f"{tmp_path} has no slurm/run.sbatch" in done.stderr


def test_words_about_the_job_are_told_from_the_recipes() -> None:
    own = ["time=04:00:00", "chain=2", "dry_run=true", "site=x", "site.options=[]", "+site.foo=1", "--help"]
    recipe = ["compress", "nodes=2", "wandb.notes=time=2", "distill.lr=1", "experiment=site", "site_=3"]
    assert split_words([*own, *recipe]) == (["--help", *own[:-1]], recipe)
    assert split_words(["compress", "--cfg", "job", "time=2", "-p", "site"]) == (
        ["--cfg", "job", "-p", "site", "time=2"],
        ["compress"],
    )
    assert split_words(["compress", "-m", "distill.lr=1,2"]) == ([], ["compress", "distill.lr=1,2", "--multirun"])


@pytest.mark.slow
def test_a_sweep_gives_every_combination_jobs_of_its_own(inputs: Path, checkout: Path) -> None:
    run = checkout.parent / "run"
    words = command(inputs, run)[2:]
    swept = ["distill.lr=1e-3,3e-3", "search.heads=[2],[2,4]", "wandb.notes='a, b','c'"]
    done = _submit(checkout, "compress", "--multirun", "site.gpus_per_node=1", "chain=2", *words, *swept)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"table: {run}/sweep.md, which every job writes at its end"
    records = _records(checkout)
    first, second = records[0]["argv"], records[1]["argv"]
    assert first[first.index("compress") + 1 :] == second[second.index("compress") + 1 :]  # one chain
    assert first[first.index("compress") + 1 :] == [
        *words,
        "--multirun",
        "distill.lr=choice(0.001)",
        "search.heads=choice([2])",
        "wandb.notes=choice('a, b')",
    ]
    got = {tuple(record["argv"][-3:]) for record in records}  # type: ignore[index]
    assert len(records) == 2 * 8 and len(got) == 8
    plans = commands.run(["-m", "recipes.compress", *first[first.index("compress") + 1 :], "dry_run=true"])
    assert plans.returncode == 0, plans.stderr
    assert f"plan of {run}/distill.lr=0.001,search.heads=[2],wandb.notes=a\\,\\ b" in plans.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compress", "-m"], "--multirun has nothing to sweep"),
        (["compress", "-m", "distill.lr=1e-3,-1"], "distill.lr=-1.0 must be > 0"),
        (["compress", "-m", "nodes=1,2"], "nodes=[1, 2] differs between runs of this sweep"),
        (["verify", "-m"], "submit verify once for each value"),
        (["compress", "--cfg"], "argument --cfg/-c: expected one argument"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_sweep_that_cannot_be_is_one_line(inputs: Path, checkout: Path, words: list[str], told: str) -> None:
    recipe = [] if words[0] == "verify" else command(inputs, checkout.parent / "run", "site.gpus_per_node=1")[2:]
    done = _submit(checkout, words[0], *recipe, *words[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr and done.stderr.count("\n") == 1 and not _records(checkout)


def test_every_site_composes_and_gives_a_script_that_bash_reads() -> None:
    assert group_names("site") == ["example"]
    for site in group_names("site"):
        config = compose_root(SUBMIT, [f"site={site}", "chain=2"])
        text = job_script(config, "compress", ["a=b c"], Path("/runs/x/jobs"), nodes=2)
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        for name, value in config.site.environment.items():
            assert f"export {name}={shlex.quote(value)}" in text


@pytest.mark.parametrize("text", ["90", "90:00", "04:00:00", "2-12", "2-12:30", "2-12:30:00"])
def test_every_form_of_a_time_limit_is_known(text: str) -> None:
    assert TIME.fullmatch(text)
    assert SubmitConfig(time=text).time == text


@pytest.mark.parametrize("text", ["4h", "", "1:2:3:4", "-1", "04:00:", "1-2-3", "UNLIMITED now"])
def test_any_other_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"time={text} is no time limit")):
        SubmitConfig(time=text)


@pytest.mark.slow
def test_documented_sweeps_are_submitted(checkout: Path) -> None:
    text = (CONF.parent / "docs" / "command_line.md").read_text().replace("\\\n", " ")
    documented = [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("python -m recipes.submit ")]
    sweeps = [words for words in documented if "-m" in words]
    assert len(sweeps) == 1
    for words in sweeps:
        done = _submit(checkout, *words, "dry_run=true")
        assert done.returncode == 0 and done.stdout.count("values=(") == 2, done.stderr
