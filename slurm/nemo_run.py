"""A recipe for those who launch with NeMo-Run: `python -m slurm.nemo_run RECIPE site=NAME nodes=N [key=value ...]`.

The words are those of `recipes.submit`, and the site is a file of conf/site; `dry_run=true` shows the batch script.
A job that fails or saves before its end is started again, `chain` starts in all.
"""

import sys
from pathlib import Path

import nemo_run as run

from compactlm_nemo.config.load import SUBMIT, compose, compose_root
from compactlm_nemo.config.submit import SubmitConfig
from compactlm_nemo.workflow.submit import has_own_settings, job_nodes, split_words


def recipe_script(words: list[str]) -> run.Script:
    """Return a recipe with its overrides, as a module that the launcher starts on every rank."""
    return run.Script(path=f"recipes.{words[0]}", args=words[1:], m=True, entrypoint="python")


def slurm_executor(config: SubmitConfig, checkout: Path, nodes: int) -> run.SlurmExecutor:
    """Return a job of a site that starts torchrun on each node, in the folder of the checkout."""
    site, where = config.site, "container-workdir" if config.site.container else "chdir"
    options = dict((option.lstrip("-").split("=", 1) + [True])[:2] for option in site.options)  # a flag is true
    return run.SlurmExecutor(
        account=site.account, partition=site.partition, nodes=nodes, time=config.time, launcher="torchrun",
        ntasks_per_node=site.gpus_per_node, gpus_per_node=site.gpus_per_node, exclusive=True, mem="0",
        container_image=site.container, container_mounts=[f"{checkout}:{checkout}", *site.mounts],
        env_vars={"PYTHONPATH": str(checkout)} | site.environment, setup_lines="\n".join(map(_load, site.modules)),
        additional_parameters={"requeue": True} | options, srun_args=[f"--{where}={checkout}"],
        retries=config.chain - 1, packager=run.Packager(),
    )  # fmt: skip


def _load(module: str) -> str:
    return f"module load {module}"


if __name__ == "__main__":
    own, words = split_words(sys.argv[1:])
    config = compose_root(SUBMIT, own)
    nodes = job_nodes([] if has_own_settings(words[0]) else [compose(words[1:])])
    run.run(recipe_script(words), slurm_executor(config, Path.cwd(), nodes), name=words[0], dryrun=config.dry_run)
