"""The zero-shot loss after cutting by each of the nine pairs of aggregators, next to the paper's order of them.

    python -m bench.pruning.pairs

Minitron (arXiv 2407.14679), table 13, cuts Nemotron-4 15B by each pair and compares LM losses before any training; this
is the same table for the bundled teacher. One scoring pass measures all pairs; every cut uses the same shape, and the
losses are of the same held-out tokens. Prints Markdown and writes bench/results/pairs.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from scipy.stats import kendalltau, spearmanr

from compactlm_nemo.config.load import compose
from compactlm_nemo.config.score import WidthMetric
from compactlm_nemo.data.windows import heldout_windows
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.importance.scores import load_scores
from compactlm_nemo.models.build import fill
from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.pruning.cut import CutSource, NarrowedSource
from compactlm_nemo.pruning.plan import make_plan
from compactlm_nemo.pruning.residual_stream import Selection
from compactlm_nemo.stages import evaluate
from compactlm_nemo.stages.context import Run

PAPER = {
    "mean_mean": 6.89, "l2_mean": 7.23, "mean_l2": 7.84, "mean_var": 8.29, "l2_l2": 8.37, "l2_var": 8.61,
    "var_mean": 8.72, "var_l2": 9.30, "var_var": 11.14,
}  # fmt: skip
"""(batch, sequence) -> LM loss on WikiText2 of the cut 15B model."""


SHAPES = {"hidden 512, MLP 1280": (512, 1280, 9), "hidden 448, MLP 1152, heads 6": (448, 1152, 6)}
"""Hidden size, MLP width and heads of the student."""


RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, help="calibration samples of 256 tokens")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens of each text")
    parser.add_argument("--run-dir", default="runs/pairs", help="folder of the scoring run; it is kept")
    args = parser.parse_args()
    overrides = [
        "experiment=smollm2_135m_cpu", f"run.dir={args.run_dir}", "model.precision=fp32",
        f"score.samples={args.samples}", f"score.width=[{','.join(PAPER)}]", f"evaluate.tokens={args.tokens}",
    ]  # fmt: skip
    for recipe in ("fetch", "import_model", "tokenize", "score"):
        words = [sys.executable, "-m", f"recipes.{recipe}", *(overrides if recipe != "fetch" else overrides[:1])]
        subprocess.run(words, check=True, stdout=sys.stderr)
    figures = measure(overrides)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pairs.json").write_text(json.dumps({"arguments": vars(args), "losses": figures}, indent=2) + "\n")
    print(markdown(figures))


def measure(overrides: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Shape -> pair -> text -> loss in nats a token."""
    config = compose(overrides)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with launched(config.parallel, config.run.seed) as mesh:
        run = Run(config, mesh, evaluate.STAGE)
        teacher, scores = run.dims("teacher"), load_scores(Path(config.run.dir) / "score")
        for shape, (hidden, ffn, heads) in SHAPES.items():
            student = teacher.with_shape(layers=teacher.num_layers, hidden=hidden, ffn=ffn, heads=heads)
            figures[shape] = {}
            for pair in PAPER:
                figures[shape][pair] = losses(run, teacher, student, scores.ranking(WidthMetric[pair], None))
                print(shape, pair, figures[shape][pair], file=sys.stderr)
    return figures


def losses(run: Run, teacher: Dims, student: Dims, ranking: dict) -> dict[str, float]:
    """LM loss of the student on each held-out text, before any training."""
    model = run.build(student)
    plan = make_plan(teacher, student, ranking)
    cut = CutSource(teacher, plan, CheckpointSource(run.path("teacher"), teacher))
    source = NarrowedSource(cut, plan.layers, Selection(plan.hidden))
    fill(model, source, run.config.model.vocab_multiple)
    figures = {}
    for name in run.config.data.heldout:
        windows = heldout_windows(
            run.token_prefix(f"heldout.{name}"), run.config.data.sequence_length, run.config.evaluate.tokens
        )
        result = evaluate_lm_loss(model, windows, micro_batch=8, progress=lambda samples: None)
        figures[name] = result.loss_nats
    return figures


def markdown(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """One row a pair in the paper's order, one column a shape and text, and the rank correlations below."""
    columns = [(shape, text) for shape, pairs in found.items() for text in next(iter(pairs.values()))]
    lines = [
        "| batch / sequence | paper | " + " | ".join(f"{shape}: {text}" for shape, text in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for pair, paper in PAPER.items():
        values = " | ".join(f"{found[shape][pair][text]:.3f}" for shape, text in columns)
        lines.append(f"| {pair.replace('_', ' / ')} | {paper:.2f} | {values} |")
    for name, correlate in (("Kendall's tau", kendalltau), ("Spearman's rho", spearmanr)):
        against = [
            correlate(list(PAPER.values()), [found[shape][pair][text] for pair in PAPER]).statistic
            for shape, text in columns
        ]
        lines.append(f"| {name} to the paper | | " + " | ".join(f"{value:.2f}" for value in against) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
