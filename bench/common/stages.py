"""Stages of a run, done by the package as `recipes.STAGE` does them, and what they took. `bench.plan` starts it.

    torchrun --nproc-per-node 2 -m bench.common.stages --stages score,distill --out FOLDER run.dir=RUN [key=value ...]

The stages between them are done as well, without being measured. Each rank writes what it saw of a stage into
OUT/STAGE.RANK.json: the peak of live tensors by the package's own meter, resident memory by the kernel's, FLOPs by
torch's counter.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.common.memory import peak_bytes
from compactlm_nemo.config.load import compose
from compactlm_nemo.models import checkpoint
from compactlm_nemo.models.checkpoint import shards_of
from compactlm_nemo.parallel.world import launch_rank
from compactlm_nemo.planning.meter import Meter
from compactlm_nemo.stages import training_run
from compactlm_nemo.training import background_save
from compactlm_nemo.training.callbacks import Callback, Step
from compactlm_nemo.workflow.runner import run_stages
from compactlm_nemo.workflow.stage_table import STAGES

HEAVY = ("score_depth", "score_pass", "teacher_targets", "training_run", "pruner")
"""Modules of stages whose import is no part of what a stage needs."""

ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
TRAININGS = ("correct_teacher", "distill")
MEASURED_STEP = 1
"""Of a training: the first that has all that a step has."""


def counter() -> FlopCounterMode:
    """Return torch's counter with what it lacks: a CPU's attention, counted as a GPU's, and a product in place."""
    forward, backward = (getattr(torch.ops.aten, name) for name in ATTENTION)
    return FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten.addmm_: lambda total, one, other, *_, **__: 2 * one[0] * one[1] * other[1],
            forward: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
            backward: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value),
        },
    )


def flops_of(counted: FlopCounterMode) -> dict[str, int]:
    """Return FLOPs of matrix products, and of attention with all keys for every query."""
    found: Counter[str] = Counter()
    for operation, flops in counted.get_flop_counts()["Global"].items():
        found["attention" if "attention" in str(operation) else "matmul"] += flops
    return dict(found)


class StepFlops(Callback):
    """Counts the FLOPs of one step of a training."""

    def __init__(self, keep: Callable[[FlopCounterMode], None]) -> None:
        self.keep, self.counted = keep, counter()

    def before_step(self, step: int) -> None:
        if step == MEASURED_STEP:
            self.counted.__enter__()

    def after_step(self, step: Step) -> None:
        if step.number == MEASURED_STEP:
            self.counted.__exit__(None, None, None)
            self.keep(self.counted)


def measured(work: Callable[..., Any], seen: dict[str, Any], trains: bool) -> Callable[..., Any]:
    """Return a stage's work that writes into `seen` what it took."""

    def run(*args: Any) -> Any:
        results: list[Any] = []

        def once() -> None:
            meter = Meter()
            uncounted = partial(_own_storages, meter)
            checkpoint.own_storages = background_save.own_storages = uncounted  # type: ignore[assignment]

            def keep(counted: FlopCounterMode) -> None:
                seen["flops"] = flops_of(counted)

            with meter, ExitStack() as stack:
                if trains:
                    training_run.distill = _with(StepFlops(keep))  # type: ignore[assignment]
                else:
                    counted = stack.enter_context(counter())
                    stack.callback(lambda: keep(counted))
                results.append(work(*args))
            seen["live"] = {"bytes": meter.peak.bytes, "by_kind": meter.peak.by_kind, "place": meter.peak.place}

        seen["resident_bytes"] = peak_bytes(once)
        return results[0]

    return run


_plain_own_storages, _plain_distill = checkpoint.own_storages, training_run.distill


def _own_storages(meter: Meter, state: dict[str, Any], **settings: Any) -> None:
    """Do as the package does, and tell the meter what lies in memory that counts already."""
    _plain_own_storages(state, **settings)
    if not settings.get("may_change"):
        meter.ignore(shard.data for shard in shards_of(state) if shard.data is not None)


def _with(callback: Callback) -> Callable[..., Any]:
    def distill(student: Any, teacher: Any, sample: Any, cfg: Any, callbacks: Any, **settings: Any) -> Any:
        return _plain_distill(student, teacher, sample, cfg, [callback, *callbacks], **settings)

    return distill


def main() -> None:
    parser = argparse.ArgumentParser(description="Does stages and writes what they took; bench.plan starts it.")
    parser.add_argument("--stages", type=lambda names: names.split(","), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    for name in HEAVY:
        importlib.import_module(f"compactlm_nemo.stages.{name}")
    config, left = compose(args.overrides), list(args.stages)
    for name, stage in STAGES.items():
        if not left:
            break
        seen: dict[str, Any] = {}
        if name in left:
            left.remove(name)
            STAGES[name] = replace(stage, run=measured(stage.run, seen, name in TRAININGS))
        if stage.is_wanted(config):
            run_stages(config, only=name)
        if seen:
            (args.out / f"{name}.{launch_rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
