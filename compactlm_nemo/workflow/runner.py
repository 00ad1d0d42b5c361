"""Runs stages: those that are done are skipped, and a failure is named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from compactlm_nemo.artifacts import (
    MANIFEST,
    file_identity,
    finished_twin,
    fresh_folder,
    read_manifest,
    refuse_damage,
    settings_of,
    stage_is_done,
    write_manifest,
)
from compactlm_nemo.config.command import recipe
from compactlm_nemo.config.load import to_yaml
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import CompactLMError, ConfigError
from compactlm_nemo.parallel.world import is_main_rank, launch_world_size
from compactlm_nemo.stages.stage import Stage
from compactlm_nemo.workflow.layout_checks import launch_problems
from compactlm_nemo.workflow.memory_guard import planned_lines, refuse_what_does_not_fit
from compactlm_nemo.workflow.owner import owned
from compactlm_nemo.workflow.preflight import ready
from compactlm_nemo.workflow.stage_table import MAKERS, STAGES, stages_of
from compactlm_nemo.workflow.wandb_artifacts import log_artifacts

if TYPE_CHECKING:
    from compactlm_nemo.parallel.mesh import Mesh

_whole: set[Path] = set()
"""Artifacts whose hashes were checked in this launch, or which it made."""


def stage_recipe(name: str, description: str | None) -> Callable[[], None]:
    """Return the command of one stage."""
    return recipe(lambda config: run_stages(config, only=name), description)


def run_stages(config: Config, only: str | None = None, until: str | None = None) -> None:
    """Run one stage, or all in order, or those up to one. Every process of the launch calls this function."""
    if of_plan := [name for name in ("search", "benefit") if getattr(config.plan, name)]:
        raise ConfigError(f"plan.{of_plan[0]}=true is read by recipes.plan alone; leave it out here.")
    names = [only] if only else stages_of(config, until)
    config, teacher = ready(config, names)
    if config.dry_run:
        from compactlm_nemo.workflow.dry_run import plan_lines

        if is_main_rank():
            print(to_yaml(config))
            print("\n".join(plan_lines(config, teacher, [STAGES[name] for name in names])))
            if teacher is not None and config.cluster.device is not None:
                print("\n".join(planned_lines(config, teacher, names)))
        return
    if problems := launch_problems(config, launch_world_size()):
        raise ConfigError(problems)
    pending = names
    console = Console(quiet=not is_main_rank())
    if launch_world_size() == 1:  # more ranks leave the decision to the main one, in _run_one
        for name in names:
            if not (told := _done_before(STAGES[name], config, *_identity(STAGES[name], config))):
                break
            console.print(f"{name}: {told}", soft_wrap=True, markup=False, highlight=False)
            pending = pending[1:]
    if pending:
        if teacher is not None and is_main_rank():
            refuse_what_does_not_fit(config, teacher, pending)
        from compactlm_nemo.parallel.interruption import job_deadline, stop_if_asked
        from compactlm_nemo.parallel.launch import launched

        with (
            owned(Path(config.run.dir)),
            launched(config.parallel, config.run.seed, job_deadline(config.run.time_limit)) as mesh,
        ):
            for name in pending:
                _run_one(STAGES[name], config, mesh, console)
                if name != names[-1]:
                    stop_if_asked(f"{name} is done")
    if config.wandb.log_artifacts and is_main_rank():
        log_artifacts(config)
    if names[-1] == "report":
        from compactlm_nemo.report.markdown import show

        show(Path(config.run.dir), console)
    if config.gate.limits and (names[-1] == "report" or STAGES[names[-1]].is_gated):
        from compactlm_nemo.report.gate import hold

        hold(config.gate.limits, Path(config.run.dir), console)  # on every rank: all end alike


def _folder(stage: Stage, config: Config) -> Path:
    return Path(config.run.dir) / stage.writes


def _identity(stage: Stage, config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings and the inputs that decide a stage's result."""
    return settings_of(stage.settings(config)), _inputs(stage, config)


def _done_before(stage: Stage, config: Config, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Return where a stage's result comes from when there is one, of this run or of another in `run.reuse`; else ""."""
    folder = _folder(stage, config)
    if stage_is_done(folder, settings, inputs):
        return "done before, skipped"
    if config.run.reuse is None:
        return ""
    if folder.is_symlink() and not folder.exists():
        folder.unlink()  # what it led to is gone
    if folder.exists():
        return ""
    other = finished_twin(Path(config.run.reuse), stage.writes, settings, inputs)
    if other is None:
        return ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(os.path.relpath(other, folder.parent.resolve()))
    return f"done before in {other.parent}, linked"


def _held_back(stage: Stage, config: Config) -> str:
    """Return why the gate lets a stage not begin; empty where it does, or is none."""
    if not (stage.is_gated and config.gate.limits):
        return ""
    from compactlm_nemo.report.gate import passes

    return "" if passes(config.gate.limits, Path(config.run.dir)) else "left out, as the gate says FAIL"


def _inputs(stage: Stage, config: Config) -> dict[str, str]:
    """Return the identity of everything that a stage reads: files of the user, artifacts of other stages."""
    files = stage.files(config)
    identities = {name: file_identity(path) for name, path in sorted(files.items()) if path.is_file()}
    run, missing = Path(config.run.dir), []
    for artifact in stage.artifacts(config):
        if config.run.reuse is not None and not (run / artifact / MANIFEST).exists():
            with suppress(CompactLMError):  # told below as missing
                _done_before(MAKERS[artifact], config, *_identity(MAKERS[artifact], config))
        try:
            identities[artifact] = read_manifest(run / artifact)["fingerprint"]
        except CompactLMError:
            missing.append(MAKERS[artifact].name)
    if missing:
        recipes = ", ".join(f"recipes.{maker}" for maker in missing)
        raise ConfigError(
            f"run.dir={run} has no finished stage {', '.join(missing)}, which {stage.name} needs; "
            f"run {recipes} first, or recipes.compress."
        )
    return identities


def _check_inputs(stage: Stage, config: Config) -> None:
    """Read every artifact that a stage uses once, when a launch first uses it, and refuse one that is damaged."""
    from compactlm_nemo.parallel.shared_files import shared_file_problems

    for artifact in stage.artifacts(config):
        folder = (Path(config.run.dir) / artifact).resolve()
        if folder not in _whole:
            refuse_damage(folder, shared_file_problems(folder, read_manifest(folder)["outputs"]))
            _whole.add(folder)


def _run_one(stage: Stage, config: Config, mesh: Mesh, console: Console) -> None:
    from compactlm_nemo.parallel.collectives import barrier, broadcast_object
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.stages.context import Run

    folder = _folder(stage, config)
    # The main rank decides for all: file systems of a cluster do not show every node the same at once.
    told = ""
    with main_rank_writes() as writes:
        if writes:
            settings, inputs = _identity(stage, config)
            told = _done_before(stage, config, settings, inputs) or _held_back(stage, config)
            if not told:
                fresh_folder(folder)
    if told := broadcast_object(told):
        console.print(f"{stage.name}: {told}", soft_wrap=True, markup=False, highlight=False)
        return
    console.print(f"{stage.name} ...")
    _check_inputs(stage, config)
    started = time.monotonic()
    try:
        results = stage.run(Run(config, mesh, stage), folder)
    except CompactLMError as error:
        error.args = (f"{stage.name}: {error}", *error.args[1:])
        raise
    except Exception as error:
        error.add_note(stage.name)  # where the failure is told
        raise
    barrier()
    if results is None:
        console.print(f"{stage.name}: stopped before its end; run it again to go on")
        return
    with main_rank_writes() as writes:
        if writes:
            seconds, devices = time.monotonic() - started, launch_world_size()
            write_manifest(folder, settings, inputs, results, seconds=seconds, devices=devices)
    _whole.add(folder.resolve())
