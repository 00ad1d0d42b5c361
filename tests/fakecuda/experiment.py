"""The experiment that is counted: Llama 3.1 8B to a 4B width student, at full width and with few layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from compactlm_nemo.config.distill import DistillConfig, Recompute
from compactlm_nemo.config.load import compose
from compactlm_nemo.config.schema import Config
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.teacher import LiveTeacher, Teacher
from compactlm_nemo.models.build import ModelChunks, build_model
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.source import declared_dims
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.planning.trainings import NoCheckpoints
from compactlm_nemo.search.space import enumerate_space
from compactlm_nemo.training.callbacks import Callback
from tests.fakecuda.cluster import Cluster

EXPERIMENT = "llama31_8b_to_4b_width"
LAYERS = 2
"""Layers of a chunk; counts of a step grow linearly with them."""
VOCAB_MULTIPLE = 128


@cache
def experiment() -> Config:
    """Return the settings of the experiment."""
    return compose([f"experiment={EXPERIMENT}", "model.source=teacher", "run.dir=runs/none"])


def shapes(mesh: Mesh, *, layers: int = LAYERS, **changes: Any) -> tuple[Dims, Dims]:
    """Return teacher and student of the experiment with `layers` layers a chunk and `changes` of both."""
    teacher = declared_dims(experiment().model)
    assert teacher is not None
    student = enumerate_space(teacher, experiment().search, mesh.tp_size)[0]
    few = {"num_layers": layers * mesh.layout.num_chunks, **changes}
    return replace(teacher, **few), replace(student, **few)


def model_of(
    dims: Dims, mesh: Mesh, *, document_end: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> ModelChunks:
    """Return this rank's part of a model, as a run builds it."""
    chunks = build_model(dims, mesh, dtype=dtype, vocab_multiple=VOCAB_MULTIPLE)
    for chunk in chunks:
        chunk.document_end = document_end
    return chunks


class _FromHere(Callback):
    """Forgets what was counted before the last step: what a model's start costs is no part of a step."""

    def __init__(self, there: Cluster, step: int) -> None:
        self.there, self.step = there, step

    def before_step(self, step: int) -> None:
        if step == self.step:
            self.there.counts.clear()


def train(
    there: Cluster,
    student: ModelChunks,
    teacher: Teacher,
    *,
    callbacks: Sequence[Callback] = (),
    micro_batches: int = 2,
    steps: int = 1,
    length: int | None = None,
    **changes: Any,
) -> None:
    """Train by the package's own loop and leave the counts of the last step.

    Args:
        micro_batches: Of one rank; the experiment's global batch has more.
        length: Tokens of a sample; None takes the experiment's.
        changes: Other settings of `distill`; overlap and recomputation are off unless they are here.
    """
    tokens = torch.zeros((length or experiment().data.sequence_length) + 1, dtype=torch.long)
    batch = micro_batches * there.mesh.dp_size * changes.get("micro_batch", 1)
    plain = {"overlap": False, "recompute": Recompute.none}
    cfg = replace(experiment().distill, steps=steps, warmup_steps=0, global_batch=batch, **{**plain, **changes})
    every = [_FromHere(there, steps - 1), *callbacks]
    with contextlib.closing(teacher):
        distill(student, teacher, lambda number: tokens, cfg, every, checkpoints=NoCheckpoints())


def distillation_step(
    there: Cluster,
    *,
    teacher: Callable[[ModelChunks], Teacher] = LiveTeacher,
    document_end: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    dims: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Take one step of the experiment and leave its counts.

    Args:
        teacher: Makes the source of targets of the teacher's chunks.
        dims: Other sizes of both models.
        settings: See `train`.
    """
    teacher_dims, student_dims = shapes(there.mesh, **(dims or {}))
    teacher_chunks, student = (
        model_of(each, there.mesh, document_end=document_end, dtype=dtype) for each in (teacher_dims, student_dims)
    )
    train(there, student, teacher(teacher_chunks), **settings)


def training_settings(**changes: Any) -> DistillConfig:
    """Return the experiment's training with other settings."""
    return replace(experiment().distill, **changes)
