"""The evaluate stage: held-out losses, size, speed and tasks of teacher, pruned and distilled model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import atomic_write_text, read_manifest
from compactlm_nemo.data.windows import heldout_windows
from compactlm_nemo.evaluation.harness import run_tasks
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.hf import export_hf
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.progress import progress_bar
from compactlm_nemo.search.cost import num_params
from compactlm_nemo.stages.context import HF, Run


def evaluate(run: Run, folder: Path) -> dict[str, Any]:
    """Held-out LM loss, size, forward speed and lm-eval tasks of teacher, pruned and distilled model."""
    trained = read_manifest(run.dir / "distill")["results"]["tokens"]
    models = (("teacher", "teacher", 0), ("pruned", "student", 0), ("distilled", "distill", trained))
    rows = [
        {"model": label, "params": num_params(run.dims(stage)), "tokens_trained": tokens}
        | _heldout_losses(run, label, stage)
        for label, stage, tokens in models
    ]
    with main_rank_writes() as writes:
        if writes:
            for row, (_, stage, _) in zip(rows, models, strict=True):
                row |= _task_results(run, stage, folder / "as_hf")
            atomic_write_text(folder / "results.json", json.dumps(rows, indent=2) + "\n")
    return {"recovered": {name: _recovered(rows, f"loss_{name}") for name in run.config.data.heldout}}


def _heldout_losses(run: Run, label: str, stage: str) -> dict[str, float]:
    """LM loss on each held-out text and the best forward speed seen."""
    config, dims, model = run.config, run.dims(stage), run.load(stage)
    row: dict[str, float] = {}
    speeds = []
    for name in config.data.heldout:
        prefix = run.token_prefix(f"heldout.{name}")
        windows = heldout_windows(prefix, config.data.sequence_length, config.evaluate.tokens).to(device())
        with progress_bar(f"evaluate {label} on {name}", len(windows), config.data.sequence_length) as advance:
            result = evaluate_lm_loss(
                model,
                dims,
                run.mesh,
                windows,
                micro_batch=config.evaluate.micro_batch,
                chunk_tokens=run.chunk_tokens(dims),
                progress=advance,
            )
        row |= {f"loss_{name}": result.loss_nats, f"tokens_{name}": result.tokens}
        speeds.append(result.tokens_per_second)
    return row | {"forward_tokens_per_second": max(speeds)}


def _task_results(run: Run, stage: str, scratch: Path) -> dict[str, float]:
    """lm-eval results of a stage's model, exported for the purpose; none without tasks."""
    if not run.config.evaluate.tasks:
        return {}
    dims = run.dims(stage)
    export_hf(run.dir / "teacher" / HF, scratch, dims, CheckpointSource(run.dir / stage, dims), run.dtype)
    values = run_tasks(scratch, run.config.evaluate)
    shutil.rmtree(scratch)
    return {f"task_{name}": value for name, value in values.items()}


def _recovered(rows: list[dict[str, Any]], key: str) -> float | None:
    """Share of the loss gap between teacher and pruned model that distillation closed; None without a gap."""
    teacher, pruned, distilled = (row[key] for row in rows)
    return None if pruned == teacher else (pruned - distilled) / (pruned - teacher)
