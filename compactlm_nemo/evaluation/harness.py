"""Measures task accuracy with the evaluation harness (lm-eval), on an exported Hugging Face folder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from compactlm_nemo.config.evaluate import EvaluateConfig
from compactlm_nemo.errors import CompactLMError, DataError
from compactlm_nemo.evaluation.outside_tasks import refuse_code

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_")
"""Variables that begin so would make a process of its own believe that the ranks of this launch share its work."""


def environment_outside() -> dict[str, str]:
    """Return the environment without what belongs to this launch, for a process of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCH)}


ACCURACIES = ("acc", "acc_norm", "exact_match", "f1")
"""Metrics of a task, of which the first that it has is its accuracy."""
_SETTINGS = ("tasks", "task_folder", "task_limit", "micro_batch")
"""What lm-eval's own process is told of `evaluate`."""


def harness_problem(cfg: EvaluateConfig) -> str:
    """Say why the tasks of a configuration cannot run here; empty when nothing is in the way."""
    if not cfg.tasks:
        return ""
    if importlib.util.find_spec("lm_eval") is None:
        return f"evaluate.tasks={cfg.tasks} needs lm-eval; pip install 'compactlm-nemo[eval]' or leave the tasks out."
    if cfg.task_folder is not None and not Path(cfg.task_folder).is_dir():
        return f"evaluate.task_folder={cfg.task_folder} does not exist; give a folder of lm-eval task files."
    if cfg.task_folder is not None:
        try:
            refuse_code(Path(cfg.task_folder))
        except DataError as error:
            return str(error)
    return ""


def unknown_tasks(cfg: EvaluateConfig) -> list[str]:
    """Return those of `evaluate.tasks` that lm-eval does not know."""
    manager = _task_manager(cfg.task_folder)
    return [task for task in cfg.tasks if not manager.match_tasks([task])]


@cache
def _task_manager(task_folder: str | None) -> Any:
    """Return lm-eval's index, which reads thousands of task files; a chain of runs asks for it before each stage."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_folder)


def run_tasks(folder: Path, cfg: EvaluateConfig) -> dict[str, float]:
    """Run lm-eval on the model that transformers loads from `folder`, and return `task/metric` -> value.

    lm-eval runs in a separate process, outside this launch's process group. Standard errors and aliases are left out.
    """
    with tempfile.TemporaryDirectory() as scratch:
        (values,) = run_tasks_without(folder, cfg, [[]], Path(scratch) / "results.jsonl", lambda: None)
    return values


def run_tasks_without(
    folder: Path, cfg: EvaluateConfig, left_out: list[list[int]], results: Path, progress: Callable[[], None]
) -> list[dict[str, float]]:
    """Run lm-eval as `run_tasks` does, on the model without the layers of each list in turn; the model is loaded once.

    Every finished list is a line of `results`; lists that a stopped run has finished are not run again. `progress` is
    called for each list.
    """
    words = [
        str(folder),
        json.dumps({name: getattr(cfg, name) for name in _SETTINGS}),
        json.dumps(left_out),
        str(results),
    ]
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "compactlm_nemo.evaluation.harness", *words],
            env=environment_outside(), stdout=subprocess.DEVNULL, stderr=messages,
        )  # fmt: skip
        num_reported = 0
        while process.poll() is None or num_reported < len(_finished(results)):
            for _ in range(len(_finished(results)) - num_reported):
                progress()
                num_reported += 1
            if process.poll() is None:
                time.sleep(0.2)
        messages.seek(0)
        last = (messages.read().strip().splitlines() or ["no message"])[-1]
    if process.returncode:
        raise CompactLMError(f"evaluate.tasks={cfg.tasks} failed in lm-eval: {last}")
    return _finished(results)


def _finished(results: Path) -> list[dict[str, float]]:
    """Read the whole lines of `results`: the last line may be incomplete, still being written or cut off by a kill."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]


def accuracy(values: dict[str, float]) -> float:
    """Average the accuracies of the tasks; a task's accuracy is `acc`, else `acc_norm`, `exact_match` or `f1`."""
    by_task: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        task, _, metric = name.rpartition("/")
        by_task.setdefault(task, {})[metric] = value
    accuracies = []
    for task, metrics in by_task.items():
        known = [metrics[name] for name in ACCURACIES if name in metrics]
        if not known:
            raise CompactLMError(
                f"evaluate.tasks: {task} has no accuracy, only {sorted(metrics)}; choose another task."
            )
        accuracies.append(known[0])
    return sum(accuracies) / len(accuracies)


def _values(outcome: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for task, metrics in outcome["results"].items():
        for name, value in metrics.items():
            metric = name.partition(",")[0]
            if isinstance(value, int | float) and not metric.endswith("_stderr") and metric != "sample_len":
                values[f"{task}/{metric}"] = float(value)
    return values


def _main(folder: str, settings: str, left_out: str, results: str) -> None:
    import lm_eval
    import lm_eval.utils
    import torch
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.models.huggingface import HFLM

    # Templates of task files are text of others: their own environment could reach all of Python.
    theirs = lm_eval.utils.env
    sandbox = SandboxedEnvironment(loader=theirs.loader, undefined=theirs.undefined, keep_trailing_newline=True)
    sandbox.filters |= theirs.filters
    lm_eval.utils.env = sandbox
    cfg, file = EvaluateConfig(**json.loads(settings)), Path(results)
    finished = "".join(json.dumps(values) + "\n" for values in _finished(file))
    file.write_text(finished)  # without a line that was cut off
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm: Any = HFLM(pretrained=folder, trust_remote_code=False, batch_size=cfg.micro_batch, device=device)
    lm.model.config.use_cache = False  # its places are counted by layer
    every = lm.model.model.layers
    manager = _task_manager(cfg.task_folder)
    for layers in json.loads(left_out)[finished.count("\n") :]:
        lm.model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(every) if i not in layers)
        outcome = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(cfg.tasks),
            task_manager=manager,
            limit=cfg.task_limit,
            bootstrap_iters=0,
        )
        assert outcome is not None  # None only on other ranks, and this process has none
        with file.open("a") as lines:
            lines.write(json.dumps(_values(outcome)) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
