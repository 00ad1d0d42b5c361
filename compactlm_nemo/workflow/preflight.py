"""What is checked before any work begins: rules between settings first, then the files that they name.

The rules need the architecture only, and nothing heavy: all broken ones are listed at once. What only a closer look at
files can tell, which needs torch and transformers, follows when there are none.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import MANIFEST
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import CompactLMError, ConfigError, listed
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.source import declared_dims, hf_assets_folder, quick_source_dims, teacher_dims
from compactlm_nemo.parallel.world import is_main_rank
from compactlm_nemo.search.space import enumerate_space
from compactlm_nemo.stages.tokenize import STAGE as TOKENIZE
from compactlm_nemo.workflow.layout_checks import layout_problems
from compactlm_nemo.workflow.stage_table import STAGES


def check(config: Config, stages: Collection[str] | None = None) -> Dims | None:
    """Return the teacher's architecture, None in a dry run that does not know it; one error lists every broken rule.

    Args:
        stages: Those that will run, None for all; texts are asked for only where one of them reads tokens.
    Raises:
        ConfigError: a rule between settings is broken, or a file cannot be used.
    """
    dims = quick_source_dims(config.model)
    if problems := run_dir_problems(Path(config.run.dir)) + rule_problems(config, dims, stages):
        raise ConfigError(listed(problems))
    try:
        dims_of_files = source_dims(config)
    except CompactLMError as error:
        raise ConfigError(str(error)) from None
    problems = rule_problems(config, dims_of_files, stages) if dims_of_files != dims else []
    if dims_of_files is not None:
        problems += _tokenizer_problems(config, dims_of_files)
        problems += _token_file_problems(config, dims_of_files)
    if problems := problems + _task_problems(config):
        raise ConfigError(listed(problems))
    return dims_of_files


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


def rule_problems(config: Config, dims: Dims | None, stages: Collection[str] | None = None) -> list[str]:
    """Return every broken rule between settings, a line each; `dims` are the teacher's where they are known."""
    running = [STAGES[name] for name in STAGES if stages is None or name in stages]
    reads_texts = any(stage is TOKENIZE or TOKENIZE.writes in stage.artifacts(config) for stage in running)
    problems: list[str] = []
    models = [] if dims is None else [dims]
    if dims is not None:
        try:
            models += enumerate_space(dims, config.search, config.parallel.tp)
        except CompactLMError as error:
            problems.append(str(error))
    for stage in STAGES.values():
        if stage is not TOKENIZE or reads_texts:
            problems += stage.problems(config, models)
    return problems + layout_problems(config, models)


def source_dims(config: Config) -> Dims | None:
    """Return the teacher's architecture; in a dry run without the teacher the one that `model.architecture` states."""
    declared = declared_dims(config.model)
    if not Path(config.model.source).exists():
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
    """Return whether the tokenizer has more entries than the model."""
    from compactlm_nemo.data.tokenizer import check_vocabulary, load_tokenizer

    if not Path(config.model.source).is_dir() or not (hf_assets_folder(config.model) / "tokenizer.json").is_file():
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
        if corpus.is_tokenised:
            try:
                stream = TokenStream(Path(corpus.path), dims.vocab_size)
                if config.data.mask_documents:
                    problems += _end_problem(config, stream)
            except CompactLMError as error:
                problems.append(str(error))
    return problems


def _end_problem(config: Config, stream: Any) -> list[str]:
    """Return whether the documents of a user's token file end with another token than the tokenizer's."""
    from compactlm_nemo.data.tokenizer import end_of_text

    hf_assets = hf_assets_folder(config.model)
    if not (hf_assets / "tokenizer.json").is_file() or stream.last_token == (end := end_of_text(hf_assets)):
        return []
    return [
        f"data.mask_documents=true: documents of {stream.prefix} end with token {stream.last_token}, the tokenizer's "
        f"is {end}; tokenise the text with it, or set mask_documents=false."
    ]
