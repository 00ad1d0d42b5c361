"""What is checked before any work begins: rules between settings first, then the files that they name.

The rules need the architecture only, and nothing heavy: all broken ones are listed at once. What only a closer look at
files can tell, which needs torch and transformers, follows when there are none.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from compactlm_nemo.artifacts import MANIFEST
from compactlm_nemo.config.model import is_repository
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.errors import CompactLMError, ConfigError, listed
from compactlm_nemo.models.dims import MODEL, Dims
from compactlm_nemo.models.hub import keep_commit, pinned
from compactlm_nemo.models.source import declared_dims, hf_assets_folder, local_source, quick_source_dims, teacher_dims
from compactlm_nemo.parallel.world import is_main_rank
from compactlm_nemo.search.cost import num_params
from compactlm_nemo.search.space import enumerate_space
from compactlm_nemo.workflow.layout_checks import layout_problems
from compactlm_nemo.workflow.stage_table import STAGES

C = TypeVar("C", bound=Config)


def ready(config: C, names: Collection[str] = tuple(STAGES)) -> tuple[C, Dims | None]:
    """Return the settings with the commit of a teacher that is a repository of the Hub, and what `check` returns.

    The commit is written down for the run's other ranks and its next start, by a run, not by a plan of one.
    """
    run_dir = Path(config.run.dir)
    found = replace(config, model=pinned(config.model, run_dir, dry_run=config.dry_run))
    dims = check(found, names)
    if not config.dry_run:
        keep_commit(config.model, found.model, run_dir)
    return found, dims


def check(config: Config, names: Collection[str] = tuple(STAGES)) -> Dims | None:
    """Return the teacher's architecture, None in a dry run that does not know it; one error lists every broken rule.

    Args:
        names: The stages that will run; only of those that read texts or tokens are the texts asked for.
    Raises:
        ConfigError: a rule between settings is broken, or a file cannot be used.
    """
    dims = with_known_vocabulary(config, quick_source_dims(config.model))
    if problems := run_dir_problems(Path(config.run.dir)) + rule_problems(config, dims, names):
        raise ConfigError(listed(problems))
    try:
        whole_dims = source_dims(config)
    except CompactLMError as error:
        raise ConfigError(str(error)) from None
    dims_of_files = with_known_vocabulary(config, whole_dims)
    problems = rule_problems(config, dims_of_files, names) if dims_of_files != dims else []
    if whole_dims is not None:
        problems += _tokenizer_problems(config, whole_dims)
        problems += _token_file_problems(config, whole_dims) if reads_texts(config, names) else []
    if problems := problems + _task_problems(config):
        raise ConfigError(listed(problems))
    return dims_of_files


def with_known_vocabulary(config: Config, dims: Dims | None) -> Dims | None:
    """Return the teacher's architecture with the vocabulary that the import has left, where there was an import."""
    if dims is None or config.model.vocab_texts is None or not _is_imported(config):
        return dims
    return replace(dims, vocab_size=Dims.load(Path(config.run.dir) / "teacher" / MODEL).vocab_size)


def planned_search(config: Config) -> SearchConfig:
    """Return the search before it runs: without budgets that count the vocabulary while its size is not known."""
    if config.model.vocab_texts is None or _is_imported(config):
        return config.search
    return replace(config.search, params=None, active_params=None, memory_bytes=None, flops=None)


def largest_student(config: Config, teacher: Dims) -> Dims:
    """Return the candidate with most parameters."""
    return max(enumerate_space(teacher, planned_search(config), config.parallel.tp), key=num_params)


def _is_imported(config: Config) -> bool:
    return (Path(config.run.dir) / "teacher" / MANIFEST).is_file()


def run_dir_problems(folder: Path) -> list[str]:
    """Return why a folder cannot be made or written to."""
    nearest = folder.absolute()
    try:
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            return [f"run.dir={folder} is or lies below the file {nearest}; choose another folder."]
        if not os.access(nearest, os.W_OK | os.X_OK):
            return [f"run.dir={folder}: {nearest} may not be written to; let this user, or choose another folder."]
    except OSError as error:
        return [f"run.dir={str(folder)[:80]} cannot be a folder ({error.strerror}); choose another."]
    return []


def reads_texts(config: Config, names: Collection[str]) -> bool:
    """Whether one of the stages reads texts, or the tokens that they become."""
    return any(name == "tokenize" or "tokens" in STAGES[name].artifacts(config) for name in names)


def rule_problems(config: Config, dims: Dims | None, names: Collection[str] = tuple(STAGES)) -> list[str]:
    """Return every broken rule between settings, a line each; `dims` are the teacher's where they are known."""
    problems: list[str] = []
    models = [] if dims is None else [dims]
    if dims is not None:
        try:
            models += enumerate_space(dims, planned_search(config), config.parallel.tp)
        except CompactLMError as error:
            problems.append(str(error))
    for name, stage in STAGES.items():
        if name != "tokenize" or reads_texts(config, names):
            problems += stage.problems(config, models)
    return problems + _rank_problems(config) + layout_problems(config, models)


def _rank_problems(config: Config) -> list[str]:
    """Return the accuracies that candidates are ranked by and that nothing measures."""
    evaluated = [*config.evaluate.choices, *config.evaluate.tasks]
    return [
        f"rank.by has {name}, which is none of {['loss', *evaluated]}; add it to evaluate.choices or evaluate.tasks, "
        "or correct the name."
        for name in config.rank.tasks
        if name not in evaluated
    ]


def source_dims(config: Config) -> Dims | None:
    """Return the teacher's architecture; in a dry run without the teacher the one that `model.architecture` states."""
    declared = declared_dims(config.model)
    if not local_source(config.model).exists():
        return declared if config.dry_run else None
    dims = teacher_dims(config.model)
    if declared is not None and declared != dims:
        raise ConfigError(_difference(Path(config.model.source), declared, dims))
    return dims


def _difference(source: Path, declared: Dims, found: Dims) -> str:
    pairs = {key: (value, getattr(found, key)) for key, value in vars(declared).items()}
    stated = ", ".join(f"{key} {want} but {have}" for key, (want, have) in pairs.items() if want != have)
    return f"model.source={source} is not the model.architecture of this experiment: {stated}; give the right teacher."


def _tokenizer_problems(config: Config, dims: Dims) -> list[str]:
    """Return whether the tokenizer has more entries than the model, or cannot be trimmed."""
    from compactlm_nemo.data.tokenizer import check_vocabulary, load_tokenizer
    from compactlm_nemo.data.trimming import trim_problem

    is_folder = local_source(config.model).is_dir()
    if is_folder and config.model.vocab_texts is not None and not is_repository(config.model.source):
        if problem := trim_problem(hf_assets_folder(config.model)):
            return [problem]
    if not is_folder or not (hf_assets_folder(config.model) / "tokenizer.json").is_file():
        return []
    try:
        check_vocabulary(load_tokenizer(hf_assets_folder(config.model)), dims.vocab_size)
    except CompactLMError as error:
        return [str(error)]
    return []


def _task_problems(config: Config) -> list[str]:
    """Return which tasks lm-eval does not know, on one rank, until they have been evaluated."""
    done = (Path(config.run.dir) / "evaluate" / MANIFEST).is_file()
    if not config.evaluate.tasks or done or not is_main_rank():
        return []
    from compactlm_nemo.evaluation.harness import unknown_tasks

    if unknown := unknown_tasks(config.evaluate):
        return [
            f"evaluate.tasks: lm-eval knows no {', '.join(unknown)}; `lm_eval --tasks list` shows its tasks, and "
            "evaluate.task_folder adds your own."
        ]
    return []


def _token_file_problems(config: Config, dims: Dims) -> list[str]:
    """Read the user's token files once, on one rank, until the tokenize stage has accepted them."""
    if config.dry_run or not is_main_rank() or (Path(config.run.dir) / "tokens" / MANIFEST).is_file():
        return []
    from compactlm_nemo.data.windows import TokenStream

    problems = []
    for corpus in config.data.corpora().values():
        if corpus.prefix is not None:
            try:
                stream = TokenStream(corpus.prefix, dims.vocab_size)
                if config.data.mask_documents:
                    problems += _end_problem(config, stream)
            except CompactLMError as error:
                problems.append(str(error))
    return problems


def _end_problem(config: Config, stream: Any) -> list[str]:
    """Return whether the documents of a user's token file end with another token than the tokenizer's."""
    from compactlm_nemo.data.tokenizer import end_of_text

    hf_assets = hf_assets_folder(config.model)
    if not (hf_assets / "tokenizer.json").is_file() or stream.last_token == (
        end := end_of_text(hf_assets, config.data.document_end)
    ):
        return []
    return [
        f"data.mask_documents=true: documents of {stream.prefix} end with token {stream.last_token}, the tokenizer's "
        f"is {end}; tokenise the text with it, or set mask_documents=false."
    ]
