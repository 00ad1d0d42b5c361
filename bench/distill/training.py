"""Short trainings of students of the bundled teacher, measured on held-out text on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.config.load import compose
from compactlm_nemo.config.run import WandbConfig, WandbMode
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.stages import distill
from compactlm_nemo.stages.context import Run
from compactlm_nemo.training.tracker import LM_LOSS, METRICS

STUDENTS: dict[str, list[str]] = {
    "width": [],
    "depth": ["search.layers=[15]", "search.ffn=[1536]"],
    "refitted": ["score.second_moments=true", "prune.reconstruct=least_squares"],
}
"""Overrides of three students: the default experiment's (23 layers, MLP 1296), half the layers, the first refitted."""


INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of training: the student and the settings that differ from the experiment's."""

    student: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of `DistillConfig` that differ from the experiment's."""
    random_start: bool = False
    """Forget the weights that were cut."""


Curve = list[dict[str, float]]
"""One entry a step: `tokens` trained, the loss on the step's batch, and held-out losses where they were measured."""


def curves(
    results: Path,
    arguments: dict[str, Any],
    folder: str,
    seeds: Sequence[int],
    ways: dict[str, Way],
    base: dict[str, Any],
) -> dict[str, dict[str, Curve]]:
    """Way -> seed -> curve. Trainings that `results` holds of an earlier call with these arguments are not repeated.

    Args:
        folder: Where runs are kept, one a seed and student.
        base: Fields of `DistillConfig` for every way.
    """
    done: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"arguments": arguments}
    if done["arguments"] != arguments:
        raise SystemExit(f"{results} is of other arguments; move it away.")
    finished: dict[str, dict[str, Curve]] = done.setdefault("curves", {})
    for seed in seeds:
        for name, way in ways.items():
            if str(seed) in finished.get(name, {}):
                continue
            config = _prepared(folder, seed, way.student)
            cfg = replace(config.distill, **(base | way.settings))
            finished.setdefault(name, {})[str(seed)] = _trained(config, cfg, way)
            results.parent.mkdir(exist_ok=True)
            results.write_text(json.dumps(done, indent=1) + "\n")
            print(seed, name, finished[name][str(seed)][-1], file=sys.stderr, flush=True)
    return {name: {str(seed): finished[name][str(seed)] for seed in seeds} for name in ways}


def _prepared(folder: str, seed: int, student: str) -> Config:
    """The configuration of a run whose stages up to the pruned student are finished, all drawn by `seed`."""
    places = [f"run.dir={folder}/{student}_{seed}", f"run.seed={seed}"]
    overrides = ["experiment=smollm2_135m_cpu", *places, *STUDENTS[student]]
    config = compose(overrides)
    if not (Path(config.run.dir) / "student" / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "recipes.fetch", overrides[0]], check=True, stdout=sys.stderr)
        for recipe in ("import_model", "tokenize", "score", "search", "prune"):
            subprocess.run([sys.executable, "-m", f"recipes.{recipe}", *overrides], check=True, stdout=sys.stderr)
    return config


def _trained(config: Config, cfg: DistillConfig, way: Way) -> Curve:
    """Train in a temporary folder inside the run's, with links to the run's stages, and return the curve."""
    run_dir, folder = Path(config.run.dir), Path(config.run.dir) / "once"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "distill").mkdir(parents=True)
    for stage in ("teacher", "tokens", "student"):
        (folder / stage).symlink_to((run_dir / stage).absolute())
    config = replace(
        config, run=replace(config.run, dir=str(folder)), distill=cfg, wandb=WandbConfig(mode=WandbMode.disabled)
    )
    with launched(config.parallel, config.run.seed) as mesh:
        run = Run(config, mesh, distill.STAGE)
        if way.random_start:
            _forget(run, run_dir / "student")
        distill.STAGE.run(run, folder / "distill")
    lines = [json.loads(line) for line in (folder / "distill" / METRICS).read_text().splitlines()]
    shutil.rmtree(folder)
    per_step = cfg.global_batch * config.data.sequence_length
    return [
        {"tokens": (line["step"] + 1) * per_step}
        | {name: value for name, value in line.items() if name.startswith("eval/") or name == LM_LOSS}
        for line in lines
    ]


def _forget(run: Run, student: Path) -> None:
    """Replace the link to the student that was cut by a student of random weights."""
    model = run.load("student")
    _initialise(model, run.config.run.seed)
    folder = run.path("student")
    folder.unlink()
    folder.mkdir()
    for path in student.glob("*.json"):
        shutil.copy(path, folder)
    run.save(folder, model)


@torch.no_grad()
def _initialise(student: ModelChunks, seed: int) -> None:
    """Draw normal weights of deviation 0.02, divided by the root of twice the layers where they write to the stream."""
    generator = torch.Generator().manual_seed(seed)
    for chunk in student:
        writers = INITIAL_STD / (2 * chunk.config.num_layers) ** 0.5
        for name, weight in chunk.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                std = writers if "linear_proj" in name or "linear_fc2" in name else INITIAL_STD
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def spread(curves: dict[str, Curve], value: Callable[[Curve], float]) -> str:
    """Mean over the seeds and half of their range."""
    values = [value(curve) for curve in curves.values()]
    return f"{sum(values) / len(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"
