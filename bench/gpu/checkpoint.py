"""A training checkpoint of the experiment's student, saved and loaded: seconds, bytes, and the weights as they were."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from bench.gpu import clock, models
from bench.gpu.record import Record
from compactlm_nemo.config.loss import CROSS_ENTROPY
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.distill.teacher import NoTeacher
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.checkpoint import Checkpoints, TrainState
from compactlm_nemo.training.optimizer import TrainableModel

LAYERS, VOCAB = 4, 32768
"""Of a real run: about 0.7 billion parameters, 9 GB of weights and optimizer state."""


def measure(record: Record, *, dry: bool) -> None:
    """Record a save after one step, and its load into the model after another step."""
    config = models.settings(dry=dry)
    _, student = models.shapes(config, dry=dry)
    if not dry:
        student = replace(student.with_shape(layers=LAYERS), vocab_size=VOCAB)
    with launched(config.parallel, seed=1) as mesh, tempfile.TemporaryDirectory() as folder:
        record.detail("free disk", shutil.disk_usage(folder).free)
        model = TrainableModel(models.random_model(models.run_on(config, mesh), student).train(), config.distill)
        tokens = models.random_tokens(student, 1, config.data.sequence_length + 1)
        checkpoints = Checkpoints(Path(folder), keep=1, is_main=True)

        def train() -> list[torch.Tensor]:
            model.advance_schedule()
            forward_backward(model.ddps, NoTeacher(mesh), [Batch(tokens, ())], loss=CROSS_ENTROPY, temperature=1.0)
            model.update(model.gradient_norm())
            return [parameter.detach().clone() for parameter in model.ddps.parameters()]

        saved = train()
        save = clock.seconds(lambda: checkpoints.save(model, TrainState(step=1)))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        record.figure("save", save, "s")
        record.figure("checkpoint", models.gigabytes(size), "GB")
        record.figure("save", models.gigabytes(size) / save, "GB/s")
        later = train()
        record.figure("load", clock.seconds(lambda: checkpoints.load(model)), "s")
        loaded = [parameter.detach() for parameter in model.ddps.parameters()]
        if are_equal(saved, later) or not are_equal(saved, loaded):
            raise ValueError("the loaded weights are not those that were saved")


def are_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Return whether all weights are equal, bit for bit."""
    return all(map(torch.equal, some, others))
