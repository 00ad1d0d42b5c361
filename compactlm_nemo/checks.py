"""Rules between settings. All broken ones are reported at once, before any process group or model exists."""

from __future__ import annotations

from pathlib import Path

from compactlm_nemo.artifacts import MANIFEST
from compactlm_nemo.config.choices import (
    DepthMetric,
    Reconstruct,
    Stream,
    TeacherSource,
    WidthMetric,
)
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.tokens import check_vocabulary, end_of_text, load_tokenizer
from compactlm_nemo.data.windows import TokenStream
from compactlm_nemo.errors import CompactLMError, ConfigError, listed
from compactlm_nemo.evaluation.harness import harness_problem
from compactlm_nemo.models.dims import Dims, split_layers
from compactlm_nemo.models.families import export_problem
from compactlm_nemo.models.teacher import companions_folder, declared_dims, teacher_dims
from compactlm_nemo.parallel.launch import is_main_rank
from compactlm_nemo.search.space import enumerate_space
from compactlm_nemo.teaching_checks import map_problem, teaching_problems, undivided


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


def _score_problems(config: Config) -> list[str]:
    score = config.score
    problems = []
    if DepthMetric.tasks in score.depth and not config.evaluate.tasks:
        problems.append("score.depth=[tasks] needs evaluate.tasks; name lm-eval tasks, for example [winogrande].")
    if score.start_from is not None and (score.second_moments or WidthMetric.taylor in score.width):
        problems.append(
            "score.start_from continues activation metrics only; leave out score.second_moments and taylor."
        )
    for name, held, chosen in (
        ("width", score.width, config.search.width),
        ("depth", score.depth, config.search.depth),
    ):
        if chosen is not None and chosen not in held:
            names = [metric.name for metric in held]
            problems.append(
                f"search.{name}={chosen.name} must be one of the metrics measured, {names}; add it to score.{name}."
            )
    return problems


def _prune_problems(config: Config, dims: Dims | None) -> list[str]:
    prune = config.prune
    problems = []
    if prune.reconstruct is not Reconstruct.none and not config.score.second_moments:
        problems.append(
            f"prune.reconstruct={prune.reconstruct.name} needs score.second_moments=true; set it, or reconstruct=none."
        )
    if prune.hidden is Stream.rotate and dims is not None and dims.layer_norm_1p:
        problems.append(
            f"prune.hidden=rotate needs RMSNorms, {dims.family} has LayerNorms, which see a rotation; use select."
        )
    return problems


def launch_problems(config: Config, world_size: int) -> str:
    """What is wrong with running this configuration on `world_size` processes; empty when nothing is."""
    parallel, distill = config.parallel, config.distill
    model_ranks = parallel.model_ranks
    if world_size % model_ranks:
        return (
            f"parallel.tp={parallel.tp} x parallel.pp={parallel.pp} x parallel.cp={parallel.cp} = {model_ranks} must "
            f"divide the {world_size} processes started; use torchrun --nproc-per-node={model_ranks} or a multiple."
        )
    teacher_ranks = config.teacher_parallel.model_ranks
    if distill.teacher is TeacherSource.live and world_size % teacher_ranks:
        return (
            f"distill.teacher_tp x distill.teacher_pp = {teacher_ranks} ranks must divide the {world_size} processes "
            f"started; use torchrun --nproc-per-node={teacher_ranks * model_ranks} or a multiple."
        )
    dp = world_size // model_ranks
    if dp % parallel.ep:
        return (
            f"parallel.ep={parallel.ep} must divide the {dp} data-parallel ranks of {world_size} processes; use "
            f"torchrun --nproc-per-node={model_ranks * parallel.ep} or a multiple."
        )
    batches = distill.global_batch // (dp * distill.micro_batch)
    if parallel.virtual_stages > 1 and batches % parallel.pp:
        return (
            f"distill.global_batch={distill.global_batch} gives {batches} micro-batches a rank, which parallel.pp="
            f"{parallel.pp} must divide when parallel.virtual_stages > 1; raise distill.global_batch."
        )
    if distill.global_batch % (dp * distill.micro_batch):
        return (
            f"distill.global_batch={distill.global_batch} must be a multiple of data-parallel ranks {dp} x "
            f"distill.micro_batch={distill.micro_batch}; use {dp * distill.micro_batch} or a multiple."
        )
    windows = config.evaluate.tokens // config.data.sequence_length
    if windows < dp:
        return (
            f"evaluate.tokens / data.sequence_length = {windows} must be at least the {dp} data-parallel ranks; raise "
            "it or start fewer ranks."
        )
    return ""


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


def _layout_problems(config: Config, dims: Dims) -> list[str]:
    """Teacher and every candidate must split over the mesh."""
    layout, length = config.parallel, config.data.sequence_length
    tp = layout.tp
    problems = []
    if length > dims.max_position_embeddings:
        problems.append(
            f"data.sequence_length={length} exceeds the {dims.max_position_embeddings} positions the teacher was made "
            "for; shorten it."
        )
    parts = (tp if layout.sequence_parallel else 1) * (2 * layout.cp if layout.cp > 1 else 1)
    timed = {"search.context": config.search.context} if config.search.latency_ms is not None else {}
    problems += [
        f"{name}={tokens} must be a multiple of {parts} (2 x parallel.cp, times parallel.tp with "
        f"parallel.sequence_parallel); use {-(-tokens // parts) * parts}."
        for name, tokens in ({"data.sequence_length": length} | timed).items()
        if tokens % parts
    ]
    try:
        models = [dims, *enumerate_space(dims, config.search, tp)]
    except CompactLMError as error:
        problems.append(str(error))
        models = [dims]
    problems += [f"parallel.tp={tp} must divide the {size}; use a common divisor." for size in undivided(models, tp)]
    problems += sorted({problem for model in models if (problem := export_problem(model))})
    problems += sorted({problem for model in models[1:] if (problem := map_problem(config, dims, model))})
    for layers in sorted({model.num_layers for model in models}):
        try:
            split_layers(layers, layout)
        except CompactLMError as error:
            problems.append(str(error))
    return problems + _expert_problems(config, dims, models)


def _expert_problems(config: Config, dims: Dims, models: list[Dims]) -> list[str]:
    """What layers with experts ask of the layout."""
    layout = config.parallel
    if not dims.num_experts:
        asked = {f"parallel.ep={layout.ep}": layout.ep > 1, "score.expert_moments=true": config.score.expert_moments}
        return [
            f"{setting} needs a model with experts, which {dims.family} is not; leave it out."
            for setting, is_asked in asked.items()
            if is_asked
        ]
    problems = []
    problems += [
        f"parallel.ep={layout.ep} must divide the {count} experts; use a divisor."
        for count in sorted({model.num_experts for model in models})
        if count % layout.ep
    ]
    if layout.tp > 1 and not layout.sequence_parallel:
        problems.append(
            f"parallel.tp={layout.tp} needs parallel.sequence_parallel=true for a model with experts; set it."
        )
    narrow = min(model.ffn_hidden_size for model in models)
    refits = config.prune.reconstruct is Reconstruct.least_squares and narrow < dims.ffn_hidden_size
    if refits and not config.score.expert_moments:
        problems.append(
            f"prune.reconstruct=least_squares with search.ffn={narrow} refits every expert's fc2 and needs "
            "score.expert_moments=true; set it."
        )
    return problems
