"""Rules between settings, models and the parallel layout."""

from __future__ import annotations

from compactlm_nemo.config.prune import Blocks, Reconstruct
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import TeacherSource
from compactlm_nemo.errors import CompactLMError
from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.layout import split_layers
from compactlm_nemo.models.limits import export_problem


def launch_problems(config: Config, world_size: int) -> str:
    """Return what is wrong with running this configuration on `world_size` processes; empty when nothing is."""
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
    if config.prune.blocks is Blocks.distill and config.prune.block_batch % dp:
        return (
            f"prune.block_batch={config.prune.block_batch} must be a multiple of the {dp} data-parallel ranks; use "
            f"{-(-config.prune.block_batch // dp) * dp} or start fewer ranks."
        )
    windows = config.evaluate.tokens // config.data.sequence_length
    if windows < dp:
        return (
            f"evaluate.tokens / data.sequence_length = {windows} must be at least the {dp} data-parallel ranks; raise "
            "it or start fewer ranks."
        )
    return ""


def layout_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return why the teacher (the first model) or a candidate cannot be split over the mesh, a line each."""
    if not models:
        return _teacher_layout_problems(config, models)
    layout, length, teacher = config.parallel, config.data.sequence_length, models[0]
    problems = []
    if length > teacher.max_position_embeddings:
        problems.append(
            f"data.sequence_length={length} exceeds the {teacher.max_position_embeddings} positions the teacher was "
            "made for; shorten it."
        )
    parts = (layout.tp if layout.sequence_parallel else 1) * (2 * layout.cp if layout.cp > 1 else 1)
    timed = {"search.context": config.search.context} if config.search.latency_ms is not None else {}
    problems += [
        f"{name}={tokens} must be a multiple of {parts} (2 x parallel.cp, times parallel.tp with "
        f"parallel.sequence_parallel); use {-(-tokens // parts) * parts}."
        for name, tokens in ({"data.sequence_length": length} | timed).items()
        if tokens % parts
    ]
    problems += [
        f"parallel.tp={layout.tp} must divide the {size}; use a common divisor."
        for size in undivided(models, layout.tp)
    ]
    problems += sorted({problem for model in models if (problem := export_problem(model))})
    for layers in sorted({model.num_layers for model in models}):
        try:
            split_layers(layers, layout)
        except CompactLMError as error:
            problems.append(str(error))
    return problems + _expert_problems(config, teacher, models) + _teacher_layout_problems(config, models)


def _expert_problems(config: Config, dims: Dims, models: list[Dims]) -> list[str]:
    """Return what layers with experts ask of the layout."""
    layout = config.parallel
    if not dims.num_experts:
        settings = {f"parallel.ep={layout.ep}": layout.ep > 1, "score.expert_moments=true": config.score.expert_moments}
        return [
            f"{setting} needs a model with experts, which {dims.family} is not; leave it out."
            for setting, is_asked in settings.items()
            if is_asked
        ]
    problems = []
    if config.search.latency_ms is not None and dims.dense_layers is not None:
        problems.append(
            f"search.latency_ms={config.search.latency_ms:g} counts layers that are alike, and the first of a "
            f"{dims.family} have no experts; leave it out."
        )
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


def _teacher_layout_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return what is wrong with a teacher on a mesh of its own."""
    layout, student, cfg = config.teacher_parallel, config.parallel, config.distill
    if layout == student:
        return []
    given = f"distill.teacher_tp={cfg.teacher_tp} and distill.teacher_pp={cfg.teacher_pp}"
    problems = []
    if cfg.teacher is not TeacherSource.live:
        problems.append(f"{given} are of a live teacher; leave them out with distill.teacher={cfg.teacher.name}.")
    if student.cp > 1 or student.ep > 1:
        problems.append(
            f"{given} need parallel.cp=1 and parallel.ep=1, not {student.cp} and {student.ep}; leave them out."
        )
    if not models:
        return problems
    dims = models[0]
    problems += [
        f"distill.teacher_tp={layout.tp} must divide the teacher's {size}; use a divisor."
        for size in undivided([dims], layout.tp)
    ]
    try:
        split_layers(dims.num_layers, layout)
    except CompactLMError as error:
        problems.append(f"distill.teacher_pp={layout.pp}: {error}")
    return problems


def undivided(models: list[Dims], tp: int) -> list[str]:
    """Return what tensor parallelism splits and `tp` does not divide, each with its size."""
    split = {axis.words: {getattr(model, axis.size) for model in models} for axis in AXES.values() if axis.split_by_tp}
    return [f"{words} {size}" for words, sizes in split.items() for size in sorted(sizes) if size % tp]
