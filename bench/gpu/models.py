"""What the parts about models share: the settings of the experiment, its teacher and student, random weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.config.load import compose
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.source import declared_dims
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.search.space import enumerate_space
from compactlm_nemo.stages.context import Run
from compactlm_nemo.stages.distill import STAGE

EXPERIMENT = "llama31_8b_to_4b_width"
ONE_GPU = ("parallel.tp=1", "parallel.sequence_parallel=false", "distill.overlap=false")
"""One rank has nothing to share or to overlap with."""
TOY = {"layers": 2, "hidden": 64, "ffn": 96, "heads": 4, "groups": 2}
TOY_STUDENT = {"layers": 2, "hidden": 48, "ffn": 64, "heads": 4, "groups": 2}
TOY_LENGTH = 32


def settings(*overrides: str, dry: bool) -> Config:
    """Return the settings of the experiment for one GPU; those of a dry run have short samples."""
    length = (f"data.sequence_length={TOY_LENGTH}",) if dry else ()
    base = (f"experiment={EXPERIMENT}", "model.source=teacher", "run.dir=runs/bench_gpu")
    return compose([*base, *ONE_GPU, *length, *overrides])


def shapes(config: Config, *, dry: bool) -> tuple[Dims, Dims]:
    """Return teacher and student of the experiment, with all their layers."""
    teacher = declared_dims(config.model)
    assert teacher is not None
    (student,) = enumerate_space(teacher, config.search)
    if dry:
        teacher = replace(teacher, vocab_size=500, head_dim=16)
        return teacher.with_shape(**TOY), teacher.with_shape(**TOY_STUDENT)
    return teacher, student


def run_on(config: Config, mesh: Mesh) -> Run:
    """Return the run that builds models as the stages do."""
    return Run(config, mesh, STAGE)


def random_model(run: Run, dims: Dims) -> ModelChunks:
    """Return a model of a run with random weights: normal numbers, around 1 in norms."""
    chunks = run.build(dims)
    randomise(chunks.parameters())
    return chunks


@torch.no_grad()
def randomise(parameters: Iterable[Tensor]) -> None:
    """Fill parameters with numbers as in a model at its start, standard deviation 0.02; vectors are around 1."""
    for parameter in parameters:
        parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.02)


def random_tokens(dims: Dims, samples: int, length: int) -> Tensor:
    """Return `[samples, length]` token ids on the device."""
    rng = torch.Generator(device()).manual_seed(1)
    return torch.randint(dims.vocab_size, (samples, length), generator=rng, device=device())


def gigabytes(value: Any) -> float:
    """Return bytes as GB, 1e9 bytes."""
    return float(value) / 1e9
