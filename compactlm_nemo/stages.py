"""The stages of a run, what each depends on, and the running of them: done ones are skipped, failures are named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from compactlm_nemo.artifacts import fresh_folder, read_manifest, settings_of, stage_is_done, write_manifest
from compactlm_nemo.checks import check, launch_problems
from compactlm_nemo.config.choices import TeacherSource
from compactlm_nemo.config.distill import deciding
from compactlm_nemo.config.load import to_yaml
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import CompactLMError, ConfigError
from compactlm_nemo.models.hf import COMPANIONS
from compactlm_nemo.parallel.launch import is_main_rank, launch_world_size, launched, main_rank_writes

if TYPE_CHECKING:
    from compactlm_nemo.parallel.groups import Mesh

EDGE_BYTES = 2**20
"""Bytes hashed at either end of an input file: enough to tell files apart without reading terabytes at each start."""


@dataclass(frozen=True)
class Stage:
    """One verb: its folder, the stages whose results it reads, and the settings that decide its result."""

    name: str
    folder: str
    needs: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    inputs: Callable[[Config], dict[str, Path]] = lambda config: {}


def _corpora(config: Config) -> dict[str, Path]:
    return {
        f"data.{name}{end}": Path(corpus.path + end)
        for name, corpus in config.data.corpora().items()
        for end in ("", ".idx", ".bin")
    }


def _source(config: Config) -> dict[str, Path]:
    source = Path(config.model.source)
    if not source.is_dir():
        return {"model.source": source}
    kinds = ("*.safetensors", "*.distcp", ".metadata")
    files = {str(path.relative_to(source)): path for kind in kinds for path in source.rglob(kind)}
    described = Path(config.model.companions or source)
    return files | {f"companions/{name}": described / name for name in COMPANIONS}


def _ranking(config: Config) -> dict[str, Path]:
    """What short distillations made of the candidates, where that decides."""
    return {"ranking": Path(config.run.dir) / "rank" / "ranking.json"} if config.rank.candidates else {}


def _how_to_cut(config: Config) -> dict[str, Any]:
    """What a search needs to know of how its candidates are cut."""
    return {name: value for name, value in vars(config.prune).items() if name != "candidate"}


def _split(config: Config) -> dict[str, Any]:
    """The layout, where the candidates depend on it."""
    cfg = config.search
    return {"parallel.tp": config.parallel.tp} if cfg.multiples or cfg.divisors or cfg.latency_ms is not None else {}


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("import", "teacher", (), lambda c: {"model.precision": c.model.precision}, _source),
        Stage("tokenize", "tokens", ("import",), lambda c: {"corpora": sorted(c.data.corpora())}, _corpora),
        Stage(
            "score",
            "score",
            ("import", "tokenize"),
            lambda c: {"score": deciding(c.score)} | c.training_text,
        ),
        Stage("search", "search", ("score",), lambda c: {"search": c.search, "prune": _how_to_cut(c)} | _split(c)),
        Stage("prune", "student", ("search",), lambda c: {"prune": c.prune}, _ranking),
        Stage(
            "correct_teacher",
            "corrected",
            ("import", "tokenize"),
            lambda c: {"correct": deciding(c.correction)} | c.training_text,
        ),
        Stage(
            "cache_teacher",
            "targets",
            ("import", "tokenize"),
            lambda c: {"cache": deciding(c.cache), "samples": c.cached_samples} | c.training_text,
        ),
        Stage(
            "distill",
            "distill",
            ("prune",),
            lambda c: {"distill": deciding(c.distill)} | c.samples_settings | c.correcting,
        ),
        Stage("evaluate", "evaluate", ("distill",), lambda c: {"evaluate": deciding(c.evaluate)}),
        Stage("export", "export", ("distill",), lambda c: {}),
        Stage("report", "report", ("evaluate", "export"), lambda c: {}),
    )
}


def file_identity(path: Path) -> str:
    """SHA-256 over a file's size and its first and last MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(0, size - EDGE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


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


def _needs(stage: Stage, config: Config) -> tuple[str, ...]:
    """Stages whose results this one reads."""
    needs = stage.needs
    if stage.name == "distill" and config.distill.teacher is TeacherSource.stored:
        needs = (*needs, "cache_teacher")
    if stage.name in ("distill", "cache_teacher") and config.corrects_before:
        needs = (*needs, "correct_teacher")
    return needs


def stages_of(config: Config) -> list[str]:
    """The stages of a whole run, in order."""
    wanted = {
        "cache_teacher": config.distill.teacher is TeacherSource.stored,
        "correct_teacher": config.corrects_before,
    }
    return [name for name in STAGES if wanted.get(name, True)]


def verb(stage: str) -> str:
    """The recipe of a stage."""
    return "import_hf" if stage == "import" else stage


def run_stages(config: Config, only: str | None = None) -> None:
    """Run one stage, or all in order. Every process of the launch calls it."""
    teacher = check(config)
    if config.dry_run:
        from compactlm_nemo.dry_run import plan_lines

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
        from compactlm_nemo.report.build import show

        show(Path(config.run.dir), console)


def _folder(stage: Stage, config: Config) -> Path:
    return Path(config.run.dir) / stage.folder


def _identity(stage: Stage, config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and inputs that decide a stage's result."""
    return settings_of(stage.settings(config)), _inputs(stage, config)


def _run_one(stage: Stage, config: Config, mesh: Mesh, console: Console) -> None:
    from compactlm_nemo import verbs
    from compactlm_nemo.caching import cache_teacher
    from compactlm_nemo.distilling import correct_teacher, train
    from compactlm_nemo.parallel.collectives import barrier, broadcast_object
    from compactlm_nemo.report.build import report
    from compactlm_nemo.run import Run

    work: dict[str, Callable[..., dict[str, Any] | None]] = {
        "import": verbs.import_model,
        "tokenize": verbs.tokenize,
        "score": verbs.score,
        "search": verbs.search,
        "prune": verbs.prune,
        "correct_teacher": correct_teacher,
        "cache_teacher": cache_teacher,
        "distill": train,
        "evaluate": verbs.evaluate,
        "export": verbs.export,
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
