"""The evaluate stage: held-out losses, size, speed and tasks of teacher, pruned and distilled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.fingerprint import heldout_loss, result_settings
from compactlm_nemo.config.schema import Config
from compactlm_nemo.evaluation.harness import harness_problem
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def evaluate_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return what is wrong with the held-out tokens and the tasks."""
    problems = []
    if config.evaluate.tokens < config.data.sequence_length:
        problems.append(
            f"evaluate.tokens={config.evaluate.tokens} is less than one window of "
            f"data.sequence_length={config.data.sequence_length}; raise it."
        )
    if problem := harness_problem(config.evaluate):
        problems.append(problem)
    return problems


def evaluate(run: Run, folder: Path) -> dict[str, Any]:
    """Measure held-out LM loss, size, forward speed and lm-eval tasks of teacher, pruned and distilled model."""
    from compactlm_nemo.artifacts import read_manifest, write_json
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.search.cost import num_params

    trained = read_manifest(run.path("distill"))["results"]["tokens"]
    models = (("teacher", "teacher", 0), ("pruned", "student", 0), ("distilled", "distill", trained))
    rows = [
        {"model": label, "params": num_params(run.dims(artifact)), "tokens_trained": tokens}
        | _heldout_losses(run, label, artifact)
        for label, artifact, tokens in models
    ]
    with main_rank_writes() as writes:
        if writes:
            for row, (_, artifact, _) in zip(rows, models, strict=True):
                row |= _task_results(run, artifact, folder / "as_hf")
            write_json(folder / "results.json", rows)
    return {"recovered": {name: _recovered(rows, f"loss_{name}") for name in run.config.data.heldout}}


def _heldout_losses(run: Run, label: str, artifact: str) -> dict[str, float]:
    """Return the LM loss on each held-out text, and the best forward speed."""
    from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
    from compactlm_nemo.progress import progress_bar
    from compactlm_nemo.stages.context import check_loss

    config, model = run.config, run.load(artifact)
    row: dict[str, float] = {}
    speeds = []
    for name in config.data.heldout:
        windows = run.heldout_windows(name, config.evaluate.tokens)
        with progress_bar(f"evaluate {label} on {name}", len(windows), config.data.sequence_length) as advance:
            result = evaluate_lm_loss(model, windows, micro_batch=config.evaluate.micro_batch, progress=advance)
        check_loss(result.loss_nats, f"{label} on {name}")
        row |= {f"loss_{name}": result.loss_nats, f"tokens_{name}": result.tokens}
        speeds.append(result.tokens_per_second)
    return row | {"forward_tokens_per_second": max(speeds)}


def _task_results(run: Run, artifact: str, scratch: Path) -> dict[str, float]:
    """Return lm-eval's results of an artifact's model, exported for the purpose; none without tasks."""
    if not run.config.evaluate.tasks:
        return {}
    import shutil

    from compactlm_nemo.evaluation.harness import run_tasks
    from compactlm_nemo.models.checkpoint import CheckpointSource
    from compactlm_nemo.models.hf import export_hf
    from compactlm_nemo.stages.context import HF

    dims = run.dims(artifact)
    export_hf(run.path("teacher") / HF, scratch, dims, CheckpointSource(run.path(artifact), dims), run.dtype)
    values = run_tasks(scratch, run.config.evaluate)
    shutil.rmtree(scratch)
    return {f"task_{name}": value for name, value in values.items()}


def _recovered(rows: list[dict[str, Any]], key: str) -> float | None:
    """Return how much of the gap between teacher's and pruned model's loss is closed, 0 to 1; None without a gap."""
    teacher, pruned, distilled = (row[key] for row in rows)
    return None if pruned == teacher else (pruned - distilled) / (pruned - teacher)


STAGE = Stage(
    name="evaluate",
    summary="teacher, pruned and distilled student -> `results.json`: losses, sizes, speed, tasks",
    reads=("teacher", "tokens", "student", "distill"),
    writes="evaluate",
    settings=lambda config: {"evaluate": result_settings(config.evaluate)} | heldout_loss(config),
    problems=evaluate_problems,
    run=evaluate,
)
