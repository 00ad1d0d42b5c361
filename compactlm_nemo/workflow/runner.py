"""The stages of a run, what each depends on, and the running of them: done ones are skipped, failures are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from compactlm_nemo.artifacts import (
    file_identity,
    fresh_folder,
    read_manifest,
    settings_of,
    stage_is_done,
    write_manifest,
)
from compactlm_nemo.config.load import to_yaml
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import CompactLMError, ConfigError
from compactlm_nemo.parallel.launch import is_main_rank, launch_world_size, launched, main_rank_writes
from compactlm_nemo.stages.stage import Stage
from compactlm_nemo.workflow.layout_checks import launch_problems
from compactlm_nemo.workflow.preflight import check
from compactlm_nemo.workflow.stage_table import STAGES, _needs, stages_of

if TYPE_CHECKING:
    from compactlm_nemo.parallel.mesh import Mesh


def _inputs(stage: Stage, config: Config) -> dict[str, str]:
    """Identity of everything the stage reads: files of the user, results of other stages."""
    files = stage.inputs(config)
    identities = {name: file_identity(path) for name, path in sorted(files.items()) if path.is_file()}
    run = Path(config.run.dir)
    for name in _needs(stage, config):
        try:
            identities[name] = read_manifest(run / STAGES[name].folder)["fingerprint"]
        except CompactLMError:
            raise ConfigError(
                f"run.dir={run} has no finished {name} stage, which {stage.name} needs; "
                f"run recipes.{verb(name)} first, or recipes.compress."
            ) from None
    return identities


def verb(stage: str) -> str:
    """The recipe of a stage."""
    return "import_hf" if stage == "import" else stage


def run_stages(config: Config, only: str | None = None) -> None:
    """Run one stage, or all in order. Every process of the launch calls it."""
    teacher = check(config)
    if config.dry_run:
        from compactlm_nemo.workflow.dry_run import plan_lines

        if is_main_rank():
            print(to_yaml(config))
            names = [only] if only else stages_of(config)
            print("\n".join(plan_lines(config, teacher, {name: STAGES[name].folder for name in names})))
        return
    if problems := launch_problems(config, launch_world_size()):
        raise ConfigError(problems)
    names = [only] if only else stages_of(config)
    pending = names
    console = Console(quiet=not is_main_rank())
    if launch_world_size() == 1:  # more ranks leave the decision to the main one, in _run_one
        while pending and stage_is_done(_folder(STAGES[pending[0]], config), *_identity(STAGES[pending[0]], config)):
            console.print(f"{pending[0]}: done before, skipped")
            pending = pending[1:]
    if pending:
        with launched(config.parallel, config.run.seed) as mesh:
            for name in pending:
                _run_one(STAGES[name], config, mesh, console)
    if names[-1] == "report":
        from compactlm_nemo.report.markdown import show

        show(Path(config.run.dir), console)


def _folder(stage: Stage, config: Config) -> Path:
    return Path(config.run.dir) / stage.folder


def _identity(stage: Stage, config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and inputs that decide a stage's result."""
    return settings_of(stage.settings(config)), _inputs(stage, config)


def _run_one(stage: Stage, config: Config, mesh: Mesh, console: Console) -> None:
    from compactlm_nemo.parallel.collectives import barrier, broadcast_object
    from compactlm_nemo.stages.cache_teacher import cache_teacher
    from compactlm_nemo.stages.context import Run
    from compactlm_nemo.stages.correct_teacher import correct_teacher
    from compactlm_nemo.stages.distill import train
    from compactlm_nemo.stages.evaluate import evaluate
    from compactlm_nemo.stages.export import export
    from compactlm_nemo.stages.import_model import import_model
    from compactlm_nemo.stages.prune import prune
    from compactlm_nemo.stages.report import report
    from compactlm_nemo.stages.score import score
    from compactlm_nemo.stages.search import search
    from compactlm_nemo.stages.tokenize import tokenize

    work: dict[str, Callable[..., dict[str, Any] | None]] = {
        "import": import_model,
        "tokenize": tokenize,
        "score": score,
        "search": search,
        "prune": prune,
        "correct_teacher": correct_teacher,
        "cache_teacher": cache_teacher,
        "distill": train,
        "evaluate": evaluate,
        "export": export,
        "report": report,
    }
    folder = _folder(stage, config)
    # The main rank decides for all: file systems of a cluster do not show every node the same at once.
    done = False
    with main_rank_writes() as writes:
        if writes:
            settings, inputs = _identity(stage, config)
            done = stage_is_done(folder, settings, inputs)
            if not done:
                fresh_folder(folder)
    if broadcast_object(done):
        console.print(f"{stage.name}: done before, skipped")
        return
    console.print(f"{stage.name} ...")
    try:
        results = work[stage.name](Run(config, mesh), folder)
    except CompactLMError as error:
        raise type(error)(f"{stage.name}: {error}") from error
    except Exception as error:
        error.add_note(f"The stage that failed: {stage.name}")
        raise
    barrier()
    if results is None:
        console.print(f"{stage.name}: stopped before its end; run it again to go on")
        return
    with main_rank_writes() as writes:
        if writes:
            write_manifest(folder, settings, inputs, results)
