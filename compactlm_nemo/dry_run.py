"""What a run would need and make, worked out from integers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compactlm_nemo.config.checks import source_dims
from compactlm_nemo.config.schema import Config, Precision
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import num_params, params_per_rank
from compactlm_nemo.search.space import enumerate_space

if TYPE_CHECKING:
    from compactlm_nemo.stages import Stage

TRAINING_BYTES = {Precision.fp32: 4 + 4 + 8, Precision.bf16: 2 + 4 + 4 + 8}
"""Bytes a parameter while training on one data-parallel rank: weight, float32 gradient, main weight, two moments."""


def plan_lines(config: Config, stages: list[Stage]) -> list[str]:
    """Ranks, per-rank parameters and bytes, and output folders of each stage."""
    parallel = config.parallel
    lines = [f"ranks needed: a multiple of tp {parallel.tp} x pp {parallel.pp} = {parallel.tp * parallel.pp}"]
    teacher = source_dims(config)
    if teacher is None:
        lines.append("sizes: known after import (the source is a GGUF file)")
    else:
        lines += _sizes(config, "teacher", teacher, 2 if config.model.precision is Precision.bf16 else 4)
        found = enumerate_space(teacher, config.search)
        lines.append(f"candidates: {len(found)}")
        lines += _sizes(
            config, "student (largest candidate)", max(found, key=num_params), TRAINING_BYTES[config.model.precision]
        )
    return lines + [f"{stage.name}: writes {Path(config.run.dir) / stage.folder}" for stage in stages]


def _sizes(config: Config, label: str, dims: Dims, bytes_per_param: int) -> list[str]:
    parallel = config.parallel
    lines = [f"{label}: {num_params(dims):,} parameters, {_shape(dims)}"]
    for stage in range(parallel.pp):
        params = params_per_rank(
            dims, tp=parallel.tp, pp=parallel.pp, stage=stage, vocab_multiple=config.model.vocab_multiple
        )
        lines.append(f"  pipeline stage {stage}: {params:,} parameters, {params * bytes_per_param:,} bytes a rank")
    return lines


def _shape(dims: Dims) -> str:
    return (
        f"{dims.num_layers} layers, hidden {dims.hidden_size}, heads {dims.num_heads}/{dims.num_query_groups}, "
        f"MLP {dims.ffn_hidden_size}"
    )
