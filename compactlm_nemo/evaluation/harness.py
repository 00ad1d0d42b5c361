"""Task accuracy through the evaluation harness (lm-eval), on an exported Hugging Face folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from compactlm_nemo.config.schema import EvaluateConfig
from compactlm_nemo.parallel.launch import device


def harness_problem(cfg: EvaluateConfig) -> str:
    """Why the tasks of a configuration cannot run here; empty when they can."""
    if not cfg.tasks:
        return ""
    if importlib.util.find_spec("lm_eval") is None:
        return f"evaluate.tasks={cfg.tasks} needs lm-eval; pip install 'compactlm-nemo[eval]' or leave the tasks out."
    if cfg.task_folder is not None and not Path(cfg.task_folder).is_dir():
        return f"evaluate.task_folder={cfg.task_folder} does not exist; give a folder of lm-eval task files."
    return ""


def run_tasks(folder: Path, cfg: EvaluateConfig) -> dict[str, float]:
    """`task/metric` -> value for every task, computed by lm-eval with the model that transformers loads from `folder`.

    Standard errors and aliases that lm-eval adds are left out. One process; call it on one rank.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    outcome: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": False},
        tasks=list(cfg.tasks),
        task_manager=TaskManager(include_path=cfg.task_folder),
        batch_size=cfg.micro_batch,
        device=str(device()),
        limit=cfg.task_limit,
        bootstrap_iters=0,
    )
    values: dict[str, float] = {}
    for task, metrics in outcome["results"].items():
        for name, value in metrics.items():
            metric = name.partition(",")[0]
            if isinstance(value, int | float) and not metric.endswith("_stderr") and metric != "sample_len":
                values[f"{task}/{metric}"] = float(value)
    return values
