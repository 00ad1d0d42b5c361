"""What a run would need and make, worked out from integers alone."""

from __future__ import annotations

from pathlib import Path

from compactlm_nemo.config.model import Precision, device_precision
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.layout import split_layers
from compactlm_nemo.search.cost import counts, num_params, params_per_rank
from compactlm_nemo.search.space import enumerate_space, shape_of
from compactlm_nemo.stages.stage import Stage
from compactlm_nemo.workflow.preflight import planned_search


def plan_lines(config: Config, teacher: Dims | None, stages: list[Stage]) -> list[str]:
    """Return ranks, parameters and bytes of a rank, and what each stage reads and writes, a line each."""
    parallel = config.parallel
    context = f" x cp {parallel.cp}" if parallel.cp > 1 else ""
    ranks = f"tp {parallel.tp} x pp {parallel.pp}{context} = {parallel.model_ranks}"
    lines = [f"ranks needed: a multiple of {ranks}" + f", times ep {parallel.ep}" * (parallel.ep > 1)]
    lines += [*_place(config), _precision(config)]
    if teacher is None:
        lines.append("sizes: unknown; give model.source, or model.architecture to plan without it")
        return lines + [line for stage in stages for line in _stage_lines(config, stage)]
    candidates = enumerate_space(teacher, planned_search(config), config.parallel.tp)
    student = max(candidates, key=num_params)
    lines += _sizes(config, "teacher", teacher)
    lines.append(f"candidates: {len(candidates)}")
    lines += _sizes(config, "student (largest candidate)", student) + _costs(config, student)
    return lines + [line for stage in stages for line in _stage_lines(config, stage)]


def _stage_lines(config: Config, stage: Stage) -> list[str]:
    return [f"{stage.name}: {_folders(config, stage)}", *stage.plan(config)]


def _place(config: Config) -> list[str]:
    """Return where the run is meant to be, where the settings say so."""
    if (device := config.cluster.device) is not None:
        each = config.cluster.devices_per_node
        return [
            f"meant for: nodes={config.nodes} x {each} {device} = {config.meant_ranks} ranks; memory is told below, "
            "time and price by recipes.plan"
        ]
    if config.nodes > 1:
        return [f"meant for: nodes={config.nodes} of a cluster without a name; cluster=NAME names it for recipes.plan"]
    return []


def _precision(config: Config) -> str:
    """Return the number format of the plan, and what the plan assumed where that is this machine's."""
    precision = config.model.precision
    if precision is not device_precision():
        return f"precision: {precision.name}"
    other, device = ("fp32 without", "a") if precision is Precision.bf16 else ("bf16 with", "no")
    return (
        f"precision: {precision.name}, as model.precision=auto is on this machine with {device} CUDA device; it is "
        f"{other} one"
    )


def _folders(config: Config, stage: Stage) -> str:
    return f"reads {', '.join(stage.artifacts(config)) or 'your files'}; writes {Path(config.run.dir) / stage.writes}"


def rank_params(config: Config, dims: Dims) -> list[int]:
    """Return the parameters of one rank of each pipeline stage."""
    layout = config.parallel
    chunks = split_layers(dims.num_layers, layout)
    return params_per_rank(dims, layout=layout, chunk_layers=chunks, vocab_multiple=config.model.vocab_multiple)


def _sizes(config: Config, label: str, dims: Dims) -> list[str]:
    lines = [f"{label}: {num_params(dims):,} parameters, {shape_of(dims)}"]
    stages = enumerate(rank_params(config, dims))
    return lines + [f"  pipeline stage {stage}: {params:,} parameters a rank" for stage, params in stages]


def _costs(config: Config, dims: Dims) -> list[str]:
    """Return what the budgets of a search count."""
    cfg = config.search
    count = {name: of(dims) for name, of in counts(cfg).items()}
    lines = [
        f"  {count['non_embedding_params']:,} parameters outside the embeddings, {count['active_params']:,} active",
        f"  {count['memory_bytes']:,} bytes for weights and {cfg.batch} x {cfg.context} tokens of keys and values, "
        f"{count['flops']:,} FLOPs a token at {cfg.context} tokens",
    ]
    if cfg.latency_ms is not None:
        lines.append(f"  search.latency_ms={cfg.latency_ms:g} is checked by the search stage, which times layers")
    return lines
