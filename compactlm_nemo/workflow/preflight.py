"""Rules between settings. All broken ones are reported at once, before any process group or model exists."""

from __future__ import annotations

from pathlib import Path

from compactlm_nemo.artifacts import MANIFEST
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.tokens import check_vocabulary, end_of_text, load_tokenizer
from compactlm_nemo.data.windows import TokenStream
from compactlm_nemo.errors import CompactLMError, ConfigError, listed
from compactlm_nemo.evaluation.harness import harness_problem
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.source import companions_folder, declared_dims, teacher_dims
from compactlm_nemo.parallel.launch import is_main_rank
from compactlm_nemo.stages.prune import _prune_problems
from compactlm_nemo.stages.score import _score_problems
from compactlm_nemo.workflow.layout_checks import _layout_problems, teaching_problems


def source_dims(config: Config) -> Dims | None:
    """Architecture of the teacher; in a dry run without it, the one that `model.architecture` states."""
    declared = declared_dims(config.model)
    if not Path(config.model.source).exists():
        return declared if config.dry_run else None
    found = teacher_dims(config.model)
    if declared is not None and declared != found:
        raise ConfigError(_difference(Path(config.model.source), declared, found))
    return found


def _difference(source: Path, declared: Dims, found: Dims) -> str:
    pairs = {key: (value, getattr(found, key)) for key, value in vars(declared).items()}
    told = ", ".join(f"{key} {want} but {have}" for key, (want, have) in pairs.items() if want != have)
    return f"model.source={source} is not the model.architecture of this experiment: {told}; give the right teacher."


def check(config: Config) -> Dims | None:
    """The teacher's architecture, as `source_dims`; one ConfigError lists every broken rule."""
    problems = _missing_files(config)
    try:
        dims = source_dims(config)
    except CompactLMError as error:
        problems.append(str(error))
        dims = None
    if dims is not None:
        problems += _tokenizer_problems(config, dims)
        problems += _token_file_problems(config, dims)
        problems += _layout_problems(config, dims)
    distill = config.distill
    if distill.global_batch % distill.micro_batch:
        problems.append(
            f"distill.micro_batch={distill.micro_batch} must divide distill.global_batch={distill.global_batch}."
        )
    problems += _data_problems(config)
    problems += _score_problems(config)
    problems += _prune_problems(config, dims)
    problems += teaching_problems(config, dims)
    if problem := harness_problem(config.evaluate):
        problems.append(problem)
    shared = {c.path for c in config.data.train.values()} & {c.path for c in config.data.heldout.values()}
    problems += [f"data.heldout and data.train share {path}; hold out other documents." for path in sorted(shared)]
    if problems:
        raise ConfigError(listed(problems))
    return dims


def _data_problems(config: Config) -> list[str]:
    data = config.data
    problems = []
    if not config.dry_run:
        problems += [
            f"data.{part} is empty; give at least one text, as data.{part}.NAME=text.jsonl."
            for part in ("train", "heldout")
            if not getattr(data, part)
        ]
    if config.evaluate.tokens < data.sequence_length:
        problems.append(
            f"evaluate.tokens={config.evaluate.tokens} is less than one window of "
            f"data.sequence_length={data.sequence_length}; raise it."
        )
    budgets = [corpus.tokens for corpus in data.train.values() if corpus.tokens is not None]
    trained = config.distill.num_samples * data.sequence_length
    if budgets and len(budgets) < len(data.train):
        problems.append("data.train has texts with `tokens` and texts without; give every one a budget, or weights.")
    elif budgets and sum(budgets) < trained:
        problems.append(
            f"data.train has budgets of {sum(budgets):,} tokens, distill.steps x global_batch x sequence_length trains "
            f"{trained:,}; lower distill.steps or raise them."
        )
    return problems


def _missing_files(config: Config) -> list[str]:
    if config.dry_run and config.model.architecture:
        return []
    problems = []
    if not Path(config.model.source).exists():
        problems.append(f"model.source={config.model.source} does not exist; give a model folder or a .gguf file.")
    for name, corpus in config.data.corpora().items():
        if not Path(corpus.path).is_file() and not corpus.is_tokenised:
            problems.append(f"data.{name}.path={corpus.path} does not exist; give a .jsonl file or a Megatron prefix.")
    return problems


def _tokenizer_problems(config: Config, dims: Dims) -> list[str]:
    if not Path(config.model.source).is_dir() or not (companions_folder(config.model) / "tokenizer.json").is_file():
        return []
    try:
        check_vocabulary(load_tokenizer(companions_folder(config.model)), dims.vocab_size)
    except CompactLMError as error:
        return [str(error)]
    return []


def _token_file_problems(config: Config, dims: Dims) -> list[str]:
    """Token files of the user are read once, by one rank, until the tokenize stage has accepted them."""
    if config.dry_run or not is_main_rank() or (Path(config.run.dir) / "tokens" / MANIFEST).is_file():
        return []
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


def _end_problem(config: Config, stream: TokenStream) -> list[str]:
    """Where documents are told apart by their end, a file of the user must end them with the same token."""
    companions = companions_folder(config.model)
    if not (companions / "tokenizer.json").is_file() or stream.last_token == (end := end_of_text(companions)):
        return []
    return [
        f"data.mask_documents=true: documents of {stream.prefix} end with token {stream.last_token}, the tokenizer's "
        f"is {end}; tokenise the text with it, or set mask_documents=false."
    ]
