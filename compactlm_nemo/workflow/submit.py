"""Submits a recipe as jobs of Slurm, once its settings have passed the checks that need no GPU.

A short script submits, `run.dir/jobs/RECIPE.sh`: variables of the site, then `sbatch` of `slurm/run.sbatch` with the
recipe's own overrides. `dry_run=true` prints it; run by hand, it submits the same jobs again.

With `--multirun` each combination of values has jobs of its own, which sweep over one value each: `lr=choice(1e-4)`.
So folders, names and the table are those of the sweep.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from compactlm_nemo.artifacts import atomic_write_text
from compactlm_nemo.config.application import parsed_words
from compactlm_nemo.config.load import CONF, compose
from compactlm_nemo.config.overrides import hydra_overrides, parse
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.submit import SiteConfig, SubmitConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.training.wandb_run import wandb_mode
from compactlm_nemo.workflow.layout_checks import launch_problems
from compactlm_nemo.workflow.preflight import ready
from compactlm_nemo.workflow.sweep import TABLE

JOBS = "jobs"
"""Folder of `run.dir` with logs of jobs and the scripts that submitted them."""

SCRIPT = "slurm/run.sbatch"
TRAINING = ("compress", "rank", "rounds", "distill", "correct_teacher")
"""Recipes with a run at W&B."""

MULTIRUN = "--multirun"
_OWN = re.compile(r"(\+\+|\+|~)?(time|chain|dry_run|hydra(\.[^=]*)?|site(\.[^=]*)?)(=.*)?", re.DOTALL)


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's flags with the words about the job, and the others: the recipe, its overrides, `--multirun`."""
    try:
        flags, overrides, options = parsed_words(words)
    except ConfigError:
        return words, []  # which the command refuses for the same reason
    own = [word for word in overrides if _OWN.fullmatch(word)]
    sweeps = [MULTIRUN] * bool(flags.multirun)
    return (
        [word for word in options if word not in ("-m", MULTIRUN)] + own,
        [word for word in overrides if not _OWN.fullmatch(word)] + sweeps,
    )


def combinations(words: list[str]) -> list[dict[str, str]]:
    """Return the combinations of values that overrides sweep over, each by the keys that are swept.

    Raises:
        ConfigError: no override has several values.
    """
    swept = {word.partition("=")[0]: values for word in words if (values := _values(word))}
    if not swept:
        raise ConfigError(f"{MULTIRUN} has nothing to sweep; give a setting several values, as distill.lr=1e-4,3e-4.")
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def _values(word: str) -> list[str]:
    """Return the values that an override sweeps over, as Hydra's grammar writes them; none where it has one value."""
    (text,) = hydra_overrides(Config, [word], sweeps=True)
    override = parse(text)
    return list(override.sweep_string_iterator()) if override.is_sweep_override() else []


def submit(config: SubmitConfig, words: list[str]) -> None:
    """Check a recipe's settings, write the script that submits it, run that, and say where to look.

    Args:
        words: The recipe, then its overrides.
    Raises:
        ConfigError: the recipe would refuse its settings, or Slurm refuses the job; nothing was submitted.
    """
    recipe, overrides = _recipe(words), [word for word in words[1:] if word != MULTIRUN]
    if MULTIRUN in words and has_own_settings(recipe):
        raise ConfigError(f"{MULTIRUN} sweeps recipes that make a run; submit {recipe} once for each value.")
    sweep = combinations(overrides) if MULTIRUN in words else []
    fixed = [word for word in overrides if not (sweep and _values(word))]
    runs: list[Config] = []
    if not has_own_settings(recipe):
        runs = [compose([*fixed, *(f"{key}={value}" for key, value in each.items())]) for each in sweep or [{}]]
    nodes = job_nodes(runs)
    for run in runs:
        ready(replace(run, dry_run=config.dry_run))  # a plan needs no model, as that of the recipe itself
        if problem := _site_problem(run, config.site) or launch_problems(run, nodes * config.site.gpus_per_node):
            raise ConfigError(problem)
    _plan(recipe, [*overrides, *[MULTIRUN] * bool(sweep)])
    folder = (Path(runs[0].run.dir) if runs else Path.cwd()).absolute() / JOBS
    text = job_script(config, recipe, fixed, folder, sweep, nodes=nodes)
    if config.dry_run:
        print(text, end="")
        return
    if not shutil.which("sbatch"):
        raise ConfigError("this machine has no sbatch; submit from a login node of the cluster, or use dry_run=true.")
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{recipe}.sh"
    atomic_write_text(script, text)
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    jobs = done.stdout.split()
    for job in jobs:
        print(f"job {job}: log in {folder / log_name(recipe, folder, job)}")
    if done.returncode:
        raise ConfigError(f"sbatch: {' '.join(done.stderr.split())}; {script} is what was tried.")
    if sweep:
        print(f"table: {folder.parent / TABLE}, which every job writes at its end")
    elif runs:
        _tell_wandb(runs[0], recipe)
        print(f"status: python -m recipes.status {shlex.quote(f'run.dir={runs[0].run.dir}')}")


def has_own_settings(recipe: str) -> bool:
    """Whether a recipe reads files and holds no model: its settings are those of conf/RECIPE.yaml."""
    return (CONF / f"{recipe}.yaml").is_file()


def job_nodes(runs: Sequence[Config]) -> int:
    """Return the nodes of each job of some runs; one where a recipe makes no run, as it is one process.

    Raises:
        ConfigError: the runs of a sweep are meant for different nodes.
    """
    counts = sorted({run.nodes for run in runs})
    if len(counts) > 1:
        raise ConfigError(f"nodes={counts} differs between runs of this sweep; give all one number, nodes={counts[0]}.")
    return counts[0] if counts else 1


def _site_problem(run: Config, site: SiteConfig) -> str:
    """Return why a run is not meant for this site, where it names a cluster."""
    count = run.cluster.devices_per_node
    if run.cluster.device is None or count == site.gpus_per_node:
        return ""
    return (
        f"site.gpus_per_node={site.gpus_per_node} must be cluster.devices_per_node={count} of {run.cluster.device}; "
        f"name the cluster of this site (cluster=NAME), or give cluster.devices_per_node={site.gpus_per_node}."
    )


def _recipe(words: list[str]) -> str:
    """Return the first word, which must be a recipe."""
    name = words[0] if words else ""
    known = sorted(
        path.stem for path in (CONF.parent / "recipes").glob("[a-z]*.py") if path.stem not in ("submit", "status")
    )
    if name not in known:
        raise ConfigError(f"RECIPE={name} must be the first word, one of {', '.join(known)}.")
    if not Path(SCRIPT).is_file():
        raise ConfigError(f"{Path.cwd()} has no {SCRIPT}; submit from the root of the checkout.")
    return name


def _plan(recipe: str, overrides: list[str]) -> None:
    """Let the recipe check its settings itself, in a dry run."""
    command = [sys.executable, "-m", f"recipes.{recipe}", *overrides, "dry_run=true"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        told = done.stderr[done.stderr.rfind("error: ") :].removeprefix("error: ").strip()
        raise ConfigError(told or f"recipes.{recipe} ended with code {done.returncode} in a dry run.")


def log_name(recipe: str, folder: Path, job: str = "%j") -> str:
    """Return the name of a job's log: job name and number."""
    return f"{job_name(recipe, folder)}-{job}.out"


def job_name(recipe: str, folder: Path) -> str:
    """Return the name of a run's jobs, from the recipe and the name of `run.dir`."""
    return re.sub(r"[^\w.-]+", "_", f"{recipe}-{folder.parent.name}")


def job_script(
    config: SubmitConfig, recipe: str, overrides: list[str], folder: Path, sweep: Sequence[Mapping[str, str]] = (), *,
    nodes: int,
) -> str:  # fmt: skip
    """Return the script that submits all jobs of a chain, each after the end of the one before, and prints numbers.

    Args:
        overrides: Those that all jobs have.
        sweep: From `combinations`; each of them has a chain of its own.
    """
    lines = [
        "#!/usr/bin/env bash",
        f"# Submits recipes.{recipe}; run by hand, it submits again.",
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
    ]
    lines += [f"[[ -v {name} ]] || export {name}={shlex.quote(value)}" for name, value in _variables(config.site)]
    lines += [
        f"export GPUS_PER_NODE={config.site.gpus_per_node}",
        "submit() {",
        f'  sbatch --parsable --export=ALL "$@" {shlex.join(_options(config, recipe, folder, nodes))} \\',
        f"    {shlex.join([SCRIPT, recipe, *overrides])}" + ' "${values[@]}"' * bool(sweep),
        "}",
    ]
    for values in sweep or [{}]:
        if sweep:
            choices = [f"{key}=choice({value})" for key, value in values.items()]
            lines.append(f"values=({shlex.join([MULTIRUN, *choices])})")
        lines += ['job="$(submit)"', 'echo "${job%%;*}"']
        if config.chain > 1:
            lines += [
                f"for _ in $(seq 2 {config.chain}); do",
                '  job="$(submit --dependency=afterany:"${job%%;*}")"',
                '  echo "${job%%;*}"',
                "done",
            ]
    return "\n".join(lines) + "\n"


def _variables(site: SiteConfig) -> list[tuple[str, str]]:
    """Return what `slurm/run.sbatch` and the job find in their environment."""
    variables = {"COMPACTLM_PYTHON": site.python}
    if site.modules:
        variables["COMPACTLM_MODULES"] = " ".join(site.modules)
    if site.container is not None:
        variables["CONTAINER_IMAGE"] = site.container
    if site.mounts:
        variables["CONTAINER_MOUNTS"] = ",".join(site.mounts)
    return [*variables.items(), *site.environment.items()]


def _options(config: SubmitConfig, recipe: str, folder: Path, nodes: int) -> list[str]:
    """Return the options of sbatch; those of `slurm/run.sbatch` hold where there is none here."""
    site = config.site
    options = {
        "job-name": job_name(recipe, folder),
        "nodes": str(nodes),
        "time": config.time,
        "gpus-per-node": str(site.gpus_per_node),
        "output": f"{str(folder).replace('%', '%%')}/{log_name(recipe, folder)}",
        "comment": str(folder.parent),
    }
    if site.partition is not None:
        options["partition"] = site.partition
    if site.account is not None:
        options["account"] = site.account
    return [f"--{name}={value}" for name, value in options.items()] + site.options


def _tell_wandb(run: Config, recipe: str) -> None:
    """Print where W&B will show the trainings."""
    mode = wandb_mode(run.wandb.mode)
    if recipe not in TRAINING:
        return
    named = run.wandb.named(run.run.dir, job_type=recipe)
    if mode == "disabled":
        print("W&B: disabled; metrics.jsonl of each training has all metrics")
    else:
        where = "/".join(word for word in (named.entity, named.project) if word)
        print(f"W&B: {mode}, {where}, run {named.name}, group {named.group}")
