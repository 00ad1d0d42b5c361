"""Task accuracy through the evaluation harness (lm-eval), on an exported Hugging Face folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compactlm_nemo.config.schema import EvaluateConfig
from compactlm_nemo.errors import CompactLMError

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_")
"""Beginnings of the variables that would make lm-eval believe it shares the work with the ranks of this launch."""


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

    It runs in a process of its own, outside this launch's process group. Standard errors and aliases are left out.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        env = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCH)}
        words = [str(folder), json.dumps(dataclasses.asdict(cfg)), str(result)]
        done = subprocess.run(
            [sys.executable, "-m", "compactlm_nemo.evaluation.harness", *words],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CompactLMError(f"evaluate.tasks={cfg.tasks} failed in lm-eval: {last}")
        values: dict[str, float] = json.loads(result.read_text())
    return values


def _values(outcome: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for task, metrics in outcome["results"].items():
        for name, value in metrics.items():
            metric = name.partition(",")[0]
            if isinstance(value, int | float) and not metric.endswith("_stderr") and metric != "sample_len":
                values[f"{task}/{metric}"] = float(value)
    return values


def _main(folder: str, settings: str, result: str) -> None:
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    cfg = EvaluateConfig(**json.loads(settings))
    outcome = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "trust_remote_code": False},
        tasks=list(cfg.tasks),
        task_manager=TaskManager(include_path=cfg.task_folder),
        batch_size=cfg.micro_batch,
        device="cuda" if torch.cuda.is_available() else "cpu",
        limit=cfg.task_limit,
        bootstrap_iters=0,
    )
    assert outcome is not None  # None only on other ranks, and this process has none
    Path(result).write_text(json.dumps(_values(outcome)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
