"""What training each layer by itself gives right after a cut: two cuts of the bundled teacher, each on both streams.

    python -m bench.pruning.blocks --windows 64 128 --passes 1 6

Held-out losses of the cut, and of the cut after `prune.blocks=distill` by each stream, number of windows of the
training text and of passes, with the seconds that took. "narrow" is refitted layer by layer before, "default" is the
plain cut of the experiment. Prints Markdown; bench/results/blocks.json has what is finished so far, a cut and every
trained layer are kept in --run-dir, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.pruning.__main__ import heldout
from compactlm_nemo.config.load import compose
from compactlm_nemo.config.prune import BlockInputs, Blocks, ErrorAxis, PruneConfig, Reconstruct, Stream
from compactlm_nemo.config.schema import Config
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.models.checkpoint import load_model
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.stages import prune
from compactlm_nemo.stages.context import Run
from compactlm_nemo.stages.kept_layers import KeptLayers
from compactlm_nemo.stages.pruner import Pruner

RESULTS = Path(__file__).parents[1] / "results" / "blocks.json"
TEXTS = ("wiki", "django")
_REFITTED = PruneConfig(
    reconstruct=Reconstruct.least_squares, hidden=Stream.rotate, by_error=[ErrorAxis.mlp], sequential=True
)
CUTS: dict[str, tuple[dict[str, int], PruneConfig]] = {
    "narrow": ({"hidden": 448, "ffn": 1152, "heads": 6}, _REFITTED),
    "default": ({"layers": 23, "ffn": 1296}, PruneConfig()),
}
"""Name -> the student's sizes and how it is cut."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS), help="cuts to train")
    parser.add_argument("--inputs", nargs="+", choices=("student", "teacher"), default=["student", "teacher"])
    parser.add_argument("--windows", type=int, nargs="+", default=[128], help="windows of 256 tokens to train on")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 6], help="passes over them")
    parser.add_argument("--lr", type=float, default=1e-2, help="prune.block_lr")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the model under training")
    parser.add_argument("--run-dir", default="runs/bench_blocks", help="folder of the run; it is kept")
    args = parser.parse_args()
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    config = scored(args)
    with launched(config.parallel, config.run.seed) as mesh:
        run = Run(config, mesh, prune.STAGE)
        _keep(done, "teacher", lambda: losses(run, run.load("teacher")))
        for cut in args.cuts:
            for inputs in args.inputs:
                for windows in args.windows:
                    for passes in args.passes:
                        settings = PruneConfig(
                            blocks=Blocks.distill, block_inputs=BlockInputs[inputs], block_samples=windows,
                            block_passes=passes, block_lr=args.lr,
                        )  # fmt: skip
                        measure(config, mesh, done, cut, settings)
    print(markdown(done))


def scored(args: argparse.Namespace) -> Config:
    """The configuration of a run, imported, tokenised and scored."""
    overrides = [
        "experiment=smollm2_135m_cpu", f"run.dir={args.run_dir}", f"model.precision={args.precision}",
        "score.samples=64", "score.micro_batch=4", "score.second_moments=true", "evaluate.tokens=4096",
        "evaluate.micro_batch=4",
    ]  # fmt: skip
    for recipe in ("import_model", "tokenize", "score"):
        subprocess.run([sys.executable, "-m", f"recipes.{recipe}", *overrides], check=True, stdout=sys.stderr)
    return compose(overrides)


def measure(config: Config, mesh: Mesh, done: dict[str, Any], cut: str, settings: PruneConfig) -> None:
    """The losses of a cut, and after the training of its layers, that are not there yet."""
    sizes, how = CUTS[cut]
    blocks = {name: value for name, value in vars(settings).items() if name.startswith("block")}
    folder = Path(config.run.dir) / "cuts" / cut
    pruner = Pruner(Run(replace(config, prune=replace(how, **blocks)), mesh, prune.STAGE))
    search = folder.parent / "search"
    if how.by_error and not (search / "elimination.safetensors").exists():
        search.mkdir(parents=True, exist_ok=True)
        pruner.eliminate_units(search)
    dims = pruner.teacher.with_shape(**sizes)
    plan = pruner.plan(dims, search)
    if not (folder / "cut").exists():  # a mark that the model beside it is whole
        folder.mkdir(parents=True, exist_ok=True)
        pruner.run.save(folder, pruner.student(dims, plan), if_not_finite="raise prune.ridge")
        (folder / "cut").touch()
    model = pruner.run.build(plan.student(pruner.teacher, dims))
    load_model(folder, model)
    _keep(done, cut, lambda: losses(pruner.run, model))
    name = (
        f"{cut}, {settings.block_inputs.name}'s stream, {settings.block_samples} windows, {settings.block_passes} "
        f"passes, lr {settings.block_lr:g}"
    )

    def train() -> dict[str, float]:
        layers = folder / name.replace(", ", "_").replace(" ", "_").replace("'", "")
        layers.mkdir(exist_ok=True)
        start = time.perf_counter()
        pruner.distill_blocks(model, plan, pruner.block_windows(), KeptLayers(layers, model.dims.num_layers, mesh))
        return losses(pruner.run, model) | {"seconds": time.perf_counter() - start}

    _keep(done, name, train)


def losses(run: Run, model: Any) -> dict[str, float]:
    """LM loss on each held-out text, nats a token."""
    return {
        text: evaluate_lm_loss(
            model, heldout(run, text), micro_batch=run.config.evaluate.micro_batch, progress=lambda samples: None
        ).loss_nats
        for text in TEXTS
    }


def _keep(done: dict[str, Any], name: str, measured: Any) -> None:
    if name not in done:
        done[name] = measured()
        print(name, done[name], file=sys.stderr, flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(done, indent=2) + "\n")


def markdown(done: dict[str, Any]) -> str:
    """One row a model: its losses, their rise over the teacher's, and the seconds of its training."""
    lines = ["| | " + " | ".join(TEXTS) + " | rise | seconds |", "|---" * 5 + "|"]
    for name, row in done.items():
        rise = " / ".join(f"{row[text] - done['teacher'][text]:.3f}" for text in TEXTS)
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        lines.append(f"| {name} | " + " | ".join(f"{row[text]:.3f}" for text in TEXTS) + f" | {rise} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
