"""The training loop of distillation."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig, Result
from compactlm_nemo.distill.hidden_states import HiddenStateLoss
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.distill.teacher import Batch, Teacher
from compactlm_nemo.distill.teacher_correction import TeacherCorrection
from compactlm_nemo.models.build import ModelChunks, recompute_activations
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import micro_batches
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.checkpoint import TrainState, latest_step, load_training, load_weights, save_training
from compactlm_nemo.training.optimizer import (
    build_optimizer,
    build_schedule,
    finish_gathering,
    gradient_norm,
    start_gathering,
    wrap_data_parallel,
)
from compactlm_nemo.training.stability import LossSpikes, NonFiniteSteps
from compactlm_nemo.training.tracker import LOSS

EVAL_LOSS = "eval/lm_loss_nats"
"""Mean of the LM loss over the held-out texts, by which a checkpoint is the best."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the loop tells and asks the world around it. All ranks call all of it."""

    log: Callable[[int, dict[str, float]], None]
    """Metrics of a 0-based step."""
    rewind: Callable[[int], None] = lambda step: None
    """Training goes on from this 0-based step: forget the metrics from there on."""
    evaluate: Callable[[], dict[str, float]] | None = None
    """Held-out metrics of the student as it is, `EVAL_LOSS` among them; collective."""
    speed: Callable[[float, float], dict[str, float]] = lambda tokens, seconds: {
        "perf/tokens_per_second": tokens / seconds
    }
    """Metrics of speed from the tokens of a step and its seconds."""


def step_batches(
    sample: Callable[[int], Tensor], batch: int, cfg: DistillConfig, mesh: Mesh, device: torch.device
) -> list[Batch]:
    """This rank's micro-batches of a global batch.

    Batch k holds samples k * global_batch ... of the one seeded order, whatever the layout; rank r takes every dp-th.
    """
    first = batch * cfg.global_batch
    mine = range(first + mesh.dp_rank, first + cfg.global_batch, mesh.dp_size)
    tokens = micro_batches(torch.stack([sample(i) for i in mine]).to(device), cfg.micro_batch)
    return [Batch(part, mine[i * cfg.micro_batch :][: len(part)]) for i, part in enumerate(tokens)]


def peak_memory_bytes() -> int:
    """Peak bytes of this rank: device memory on CUDA, resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def distill(
    student: ModelChunks,
    teacher: Teacher,
    dims: Dims,
    mesh: Mesh,
    sample: Callable[[int], Tensor],
    cfg: DistillConfig,
    outside: Callbacks,
    *,
    chunk_tokens: int,
    checkpoints: Path,
    is_main: bool,
    device: torch.device,
    until: int | None = None,
    hidden_loss: HiddenStateLoss | None = None,
    corrector: TeacherCorrection | None = None,
) -> TrainState:
    """Train the student from the newest checkpoint (or the start) to `cfg.steps`; returns where it ends.

    `until` ends earlier, without changing the schedule. Collective.
    """
    student.train()
    if cfg.recompute:
        recompute_activations(student)
    ddps = wrap_data_parallel(student, overlap=cfg.overlap)
    optimizer = build_optimizer(ddps, cfg)
    schedule = build_schedule(optimizer, cfg)

    def load() -> TrainState:
        position = load_training(checkpoints, ddps, optimizer, schedule, mesh, hidden_loss)
        if corrector is not None:
            corrector.load(position.step)
        return position

    def save() -> None:
        finish_gathering(ddps)
        position.losses, position.skipped = list(spikes.losses), non_finite.skipped
        if corrector is not None:
            corrector.save(position.step)
        save_training(
            checkpoints, ddps, optimizer, schedule, mesh,
            position=position, keep=cfg.keep_checkpoints, is_main=is_main, hidden_loss=hidden_loss,
        )  # fmt: skip

    position = TrainState() if latest_step(checkpoints) is None else load()
    non_finite = NonFiniteSteps(cfg.skip_limit, position.skipped)
    spikes = LossSpikes(cfg.spike_factor, cfg.spike_limit, position.losses)
    if cfg.spike_factor is not None and latest_step(checkpoints) is None:
        save()  # a spike must find one to go back to
    last = cfg.steps if until is None else until
    while position.step < last:
        step, start = position.step, time.perf_counter()
        schedule.step(1)
        batches = step_batches(sample, step + position.skipped_batches, cfg, mesh, device)
        terms = forward_backward(
            ddps, teacher, dims, mesh, batches,
            loss=cfg.loss, temperature=cfg.temperature, chunk_tokens=chunk_tokens, hidden_loss=hidden_loss,
        )  # fmt: skip
        if spikes.must_rewind(step, terms[LOSS], position.rewinds):
            rewinds, passed = position.rewinds + 1, position.skipped_batches + step + 1
            position = load()
            position.rewinds, position.skipped_batches = rewinds, passed - position.step
            spikes = LossSpikes(cfg.spike_factor, cfg.spike_limit, position.losses)
            outside.rewind(position.step)
            continue
        grad_norm = gradient_norm(optimizer)
        if not non_finite.should_skip(step, terms | {"train/grad_norm": grad_norm}):
            optimizer.step()
            start_gathering(ddps)
            if hidden_loss is not None:
                hidden_loss.step(optimizer.param_groups[0]["lr"])
        if corrector is not None:
            terms |= corrector.train_on(step, batches)
        position.step = step + 1
        seconds = time.perf_counter() - start
        held_out = _held_out(ddps, outside, cfg, position)
        if position.step % cfg.log_every == 0 or position.step == last or held_out:
            guards = {"train/skipped_steps": float(non_finite.skipped), "train/rewinds": float(position.rewinds)}
            rates = {"train/grad_norm": grad_norm, "train/lr": optimizer.param_groups[0]["lr"]}
            speed = outside.speed(terms["train/tokens"], seconds) | {"perf/step_seconds": seconds}
            memory = {"perf/peak_memory_bytes": float(peak_memory_bytes())}
            outside.log(step, terms | rates | guards | speed | memory | held_out)
        if position.step % cfg.checkpoint_every == 0 or position.step in (last, position.best_step):
            save()
    if cfg.result is Result.best and position.best_step not in (None, position.step) and position.step == cfg.steps:
        load_weights(checkpoints, ddps, mesh, position.best_step)
    return position


def _held_out(ddps: list[Any], outside: Callbacks, cfg: DistillConfig, position: TrainState) -> dict[str, float]:
    """Held-out metrics when they are due; notes in the position when these weights are the best."""
    due = cfg.eval_every is not None and (position.step % cfg.eval_every == 0 or position.step == cfg.steps)
    if outside.evaluate is None or not due:
        return {}
    finish_gathering(ddps)
    values = outside.evaluate()
    for ddp in ddps:
        ddp.train()
    if position.best_loss is None or values[EVAL_LOSS] < position.best_loss:
        position.best_step, position.best_loss = position.step, values[EVAL_LOSS]
    return values
