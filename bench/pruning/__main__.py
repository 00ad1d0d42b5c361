"""What a cut costs before any training: plain, merged, refitted, rotated, sequential, and NVIDIA Model-Optimizer's.

    python -m bench.pruning --seeds 1234 1 2

Five cuts of the bundled teacher in fp32, each by several ways, from the same calibration windows and on the same
held-out tokens. The first seed gets every way, further ones the plain cut and the best way: fresh draws of the
calibration windows. Model-Optimizer's public entry point cuts in its own environment. Prints Markdown;
bench/results/pruning.json has what is finished so far, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.common.teacher import ASSETS
from bench.common.texts import fetch_bible
from bench.common.venv import MODEL_OPTIMIZER, interpreter
from compactlm_nemo.config.load import compose
from compactlm_nemo.config.prune import ErrorAxis, HeadCut, PruneConfig, Reconstruct, Stream
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.score import DepthMetric
from compactlm_nemo.data.windows import calibration_windows, heldout_windows
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.stages import prune
from compactlm_nemo.stages.context import Run
from compactlm_nemo.stages.pruner import Pruner

RESULTS = Path(__file__).parents[1] / "results" / "pruning.json"


TEXTS = ("wiki", "django", "bible")


TARGETS: dict[str, dict[str, int]] = {
    "heads 6": {"heads": 6},
    "MLP 768": {"ffn": 768},
    "hidden 448": {"hidden": 448},
    "layers 24": {"layers": 24},
    "hidden 448, MLP 1152, heads 6": {"hidden": 448, "ffn": 1152, "heads": 6},
}


EXPORT_NAMES = {
    "heads": "num_attention_heads",
    "ffn": "ffn_hidden_size",
    "hidden": "hidden_size",
    "layers": "num_layers",
}
"""Model-Optimizer's names of the same sizes."""


PEER = "Model-Optimizer 0.43.0"


@dataclass(frozen=True)
class Way:
    """One way to cut."""

    prune: PruneConfig
    depth: DepthMetric = DepthMetric.bi
    targets: tuple[str, ...] = field(default_factory=lambda: tuple(TARGETS))


_REFIT = PruneConfig(reconstruct=Reconstruct.least_squares)


_BEST = replace(_REFIT, hidden=Stream.rotate, by_error=[ErrorAxis.mlp])


WAYS = {
    "plain": Way(PruneConfig()),
    "merge": Way(PruneConfig(heads=HeadCut.merge), targets=("heads 6",)),
    "refit": Way(_REFIT, DepthMetric.lm_loss_blocks),
    "best": Way(_BEST, DepthMetric.lm_loss_blocks),
    "sequential": Way(replace(_BEST, sequential=True), DepthMetric.lm_loss_blocks),
}
"""best: refit, the stream rotated, neurons chosen by the error that is left. Layers: one block, chosen by the loss."""


EVERY_SEED = ("plain", "best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2], help="draws of calibration windows")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens of each text")
    parser.add_argument("--run-dir", default="runs/bench_pruning", help="folder of the scoring runs; it is kept")
    args = parser.parse_args()
    subprocess.run([sys.executable, "-m", "recipes.fetch", "experiment=smollm2_135m_cpu"], check=True)
    fetch_bible(ASSETS / "bible" / "heldout.jsonl")
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    draws = {name: value for name, value in vars(args).items() if name != "run_dir"}
    if done.get("arguments", draws) != draws:
        raise SystemExit(f"{RESULTS} is of other arguments; move it away.")
    done["arguments"] = draws
    for number, seed in enumerate(args.seeds):
        config = scored(args, seed)
        slow = {name: way for name, way in WAYS.items() if way.prune.sequential}
        measure(config, done, str(seed), {n: WAYS[n] for n in (WAYS if number == 0 else EVERY_SEED) if n not in slow})
        measure_peer(config, done, str(seed), args)
        if number == 0:
            measure(config, done, str(seed), slow)
    print(markdown(done))


def scored(args: argparse.Namespace, seed: int) -> Config:
    """The configuration of a run of this seed, imported, tokenised and scored."""
    overrides = [
        "experiment=smollm2_135m_cpu", f"run.dir={args.run_dir}/{seed}", f"run.seed={seed}", "model.precision=fp32",
        f"data.heldout.bible={ASSETS}/bible/heldout.jsonl", "data.sequence_length=512",
        f"score.samples={args.samples}", "score.micro_batch=4", "score.second_moments=true",
        "score.depth=[bi,lm_loss_blocks]", "score.block_lengths=[6]",
        "score.depth_samples=16", f"evaluate.tokens={args.tokens}", "evaluate.micro_batch=4",
    ]  # fmt: skip
    for recipe in ("import_model", "tokenize", "score"):
        subprocess.run([sys.executable, "-m", f"recipes.{recipe}", *overrides], check=True, stdout=sys.stderr)
    return compose(overrides)


def measure(config: Config, done: dict[str, Any], seed: str, ways: dict[str, Way]) -> None:
    """The losses of every way and cut that are not there yet."""
    with launched(config.parallel, config.run.seed) as mesh:
        search = Path(config.run.dir) / "search"
        if not (search / "elimination.safetensors").exists():
            search.mkdir(exist_ok=True)
            Pruner(Run(replace(config, prune=_BEST), mesh, prune.STAGE)).eliminate_units(search)
        run = Run(config, mesh, prune.STAGE)
        _keep(done, seed, "teacher", "teacher", lambda: losses(run, run.load("teacher"), run.dims("teacher")))
        for way, settings in ways.items():
            chosen = replace(config.search, depth=settings.depth)
            cutting = Pruner(Run(replace(config, prune=settings.prune, search=chosen), mesh, prune.STAGE))
            for target in settings.targets:
                student = cutting.teacher.with_shape(**TARGETS[target])

                def cut(cutting: Pruner = cutting, student: Any = student) -> dict[str, float]:
                    model = cutting.student(student, cutting.plan(student, search))
                    return losses(cutting.run, model, student)

                _keep(done, seed, target, way, cut)


def _keep(done: dict[str, Any], seed: str, target: str, way: str, measured: Any) -> None:
    rows = done.setdefault("losses", {}).setdefault(seed, {}).setdefault(target, {})
    if way not in rows:
        rows[way] = measured()
        print(seed, target, way, rows[way], file=sys.stderr, flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(done, indent=2) + "\n")


def heldout(run: Run, text: str) -> Tensor:
    return heldout_windows(
        run.token_prefix(f"heldout.{text}"), run.config.data.sequence_length, run.config.evaluate.tokens
    )


def losses(run: Run, model: Any, dims: Any) -> dict[str, float]:
    """LM loss on each held-out text, nats a token."""
    return {
        text: evaluate_lm_loss(
            model, heldout(run, text), micro_batch=run.config.evaluate.micro_batch, progress=lambda samples: None
        ).loss_nats
        for text in TEXTS
    }


def measure_peer(config: Config, done: dict[str, Any], seed: str, args: argparse.Namespace) -> None:
    """Model-Optimizer's cuts of the same teacher, calibrated and evaluated on the same tokens."""
    missing = [target for target in TARGETS if PEER not in done["losses"][seed].get(target, {})]
    if not missing:
        return
    subprocess.run([sys.executable, "-m", "bench.common.teacher"], check=True)
    tokens = Path(config.run.dir) / "bench_tokens.safetensors"
    with launched(config.parallel, config.run.seed) as mesh:
        run = Run(config, mesh, prune.STAGE)
        windows = calibration_windows(run.calibration_corpora(), args.samples, 512, config.run.seed)
        save_file({"calibration": windows, **{text: heldout(run, text) for text in TEXTS}}, tokens)
    sizes = {target: {EXPORT_NAMES[axis]: size for axis, size in TARGETS[target].items()} for target in missing}
    command = [str(interpreter(MODEL_OPTIMIZER)), "-m", "bench.pruning.minitron_prune", str(tokens), json.dumps(sizes)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    for target, values in json.loads(answer).items():
        _keep(done, seed, target, PEER, lambda values=values: values)


def markdown(done: dict[str, Any]) -> str:
    """One row a cut, one column a way: losses of all texts; then mean and spread over the seeds."""
    first, *_ = done["losses"].values()
    ways = [PEER, *WAYS]
    lines = ["| cut | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for target in TARGETS:
        cells = [
            " / ".join(f"{v:.3f}" for v in first[target][way].values()) if way in first[target] else "" for way in ways
        ]
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    every = [PEER, *EVERY_SEED]
    lines += ["", f"Mean and half the range over {len(done['losses'])} draws:", ""]
    lines += ["| cut | " + " | ".join(every) + " |", "|---" * (len(every) + 1) + "|"]
    for target in TARGETS:
        cells = []
        for way in every:
            values = torch.tensor([[seed[target][way][text] for text in TEXTS] for seed in done["losses"].values()])
            spread = (values.amax(dim=0) - values.amin(dim=0)) / 2
            cells.append(" / ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(values.mean(dim=0), spread, strict=True)))
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
