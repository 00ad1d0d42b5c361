"""The training loop of distillation."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.config.schema import DistillConfig
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.errors import NumericsError
from compactlm_nemo.models.build import Chunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import micro_batches
from compactlm_nemo.parallel.groups import Mesh
from compactlm_nemo.training.checkpoint import latest_step, load_training, save_training
from compactlm_nemo.training.optimizer import build_optimizer, build_schedule, wrap_data_parallel


def step_batches(
    sample: Callable[[int], Tensor], step: int, cfg: DistillConfig, mesh: Mesh, device: torch.device
) -> list[Tensor]:
    """This rank's micro-batches of a step, `[micro_batch, S + 1]` each.

    Step k holds samples k * global_batch ... of the one seeded order, whatever the layout; rank r takes every dp-th.
    """
    first = step * cfg.global_batch
    mine = [sample(i) for i in range(first + mesh.dp_rank, first + cfg.global_batch, mesh.dp_size)]
    return micro_batches(torch.stack(mine).to(device), cfg.micro_batch)


def peak_memory_bytes() -> int:
    """Peak bytes of this rank: device memory on CUDA, resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def distill(
    student: Chunks,
    teacher: Chunks,
    dims: Dims,
    mesh: Mesh,
    sample: Callable[[int], Tensor],
    cfg: DistillConfig,
    *,
    checkpoints: Path,
    log: Callable[[int, dict[str, float]], None],
    is_main: bool,
    device: torch.device,
    until: int | None = None,
) -> int:
    """Train the student from the newest checkpoint (or the start) to `cfg.steps`; returns the finished steps.

    `until` ends earlier, without changing the schedule. Collective.
    """
    student.train()
    teacher.eval()
    ddps = wrap_data_parallel(student)
    optimizer = build_optimizer(ddps, cfg)
    schedule = build_schedule(optimizer, cfg)
    done = 0
    if latest_step(checkpoints) is not None:
        done = load_training(checkpoints, ddps, optimizer, schedule, mesh)
    last = cfg.steps if until is None else until
    for step in range(done, last):
        start = time.perf_counter()
        schedule.step(1)
        batches = step_batches(sample, step, cfg, mesh, device)
        terms = forward_backward(
            ddps, teacher, dims, mesh, batches, temperature=cfg.temperature, chunk_tokens=cfg.chunk_tokens
        )
        _, grad_norm, _ = optimizer.step()
        if math.isnan(terms["train/kd_logit_nats"]):
            raise NumericsError(f"distill: step {step}: train/kd_logit_nats is NaN; lower distill.lr={cfg.lr}.")
        if (step + 1) % cfg.log_every == 0 or step + 1 == last:
            seconds = time.perf_counter() - start
            log(step, terms | _measures(optimizer, grad_norm, terms["train/tokens"], seconds))
        if (step + 1) % cfg.checkpoint_every == 0 or step + 1 == last:
            save_training(
                checkpoints, ddps, optimizer, schedule, mesh, step=step + 1, keep=cfg.keep_checkpoints, is_main=is_main
            )
    return last


def _measures(optimizer: Any, grad_norm: float | None, tokens: float, seconds: float) -> dict[str, float]:
    return {
        "train/grad_norm": float(grad_norm or 0.0),
        "train/lr": optimizer.param_groups[0]["lr"],
        "perf/tokens_per_second": tokens / seconds,
        "perf/step_seconds": seconds,
        "perf/peak_memory_bytes": float(peak_memory_bytes()),
    }
