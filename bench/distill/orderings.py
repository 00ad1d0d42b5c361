"""Do the first paper's orderings hold on a small model and few tokens? Losses, hidden states, and what to start from.

    python -m bench.distill.orderings --seeds 1 2 3 --steps 20

Students of the bundled teacher, each way trained on the same tokens in the same order; a seed draws the calibration
samples and the order. Held-out losses at the end, mean and half the range over the seeds, as Markdown; curves as
docs/orderings.png. bench/results/orderings.json has what is finished so far, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from bench.distill.training import Curve, Way, curves, spread
from compactlm_nemo.config.loss import CROSS_ENTROPY, HiddenConfig, LossConfig
from compactlm_nemo.config.teacher import TeacherSource
from compactlm_nemo.report.plots import save
from compactlm_nemo.training.tracker import LM_LOSS

RESULTS = Path(__file__).parents[1] / "results" / "orderings.json"


PLOT = Path(__file__).parents[2] / "docs" / "orderings.png"


TEXTS = ("wiki", "django")


def _with_training_loss(**weight: float) -> dict[str, LossConfig]:
    return {"loss": LossConfig(**({"forward_kl": 0.0, "cross_entropy": 1.0} | weight))}


_THIRD_LAST = [[-3, -3]]


TABLES: dict[str, dict[str, tuple[Way, float | None]]] = {
    "Losses (table 15)": {
        "forward KL": (Way(student="width"), 2.107),
        "training loss + forward KL": (Way(student="width", settings=_with_training_loss(forward_kl=1.0)), 2.117),
        "training loss + cosine": (Way(student="width", settings=_with_training_loss(cosine=1.0)), 2.134),
        "training loss + reverse KL": (Way(student="width", settings=_with_training_loss(reverse_kl=1.0)), 2.140),
        "training loss + MSE": (Way(student="width", settings=_with_training_loss(mse=1.0)), 2.144),
    },
    "What to start from, and with what (tables 1 and 11)": {
        "forward KL": (Way(student="width"), None),
        "training loss alone": (
            Way(student="width", settings={"teacher": TeacherSource.none, "loss": CROSS_ENTROPY}), None,
        ),
        "forward KL, random start": (Way(student="width", random_start=True), None),
    },
    "Half of the layers (tables 16 and 17)": {
        "forward KL, depth": (Way(student="depth"), 2.155),
        "reverse KL, depth": (
            Way(student="depth", settings={"loss": LossConfig(forward_kl=0.0, reverse_kl=1.0)}), 2.665,
        ),
        "forward KL + hidden, depth": (
            Way(student="depth", settings={"hidden": HiddenConfig(layers=_THIRD_LAST)}), 2.145,
        ),
        "forward KL + hidden + embedding, depth": (
            Way(student="depth", settings={"hidden": HiddenConfig(layers=_THIRD_LAST, embedding=True)}), 2.141,
        ),
    },
}  # fmt: skip
"""Question -> way -> how it trains, and the loss in the paper."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=20, help="steps of 1,024 tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens of each text")
    parser.add_argument("--run-dir", default="runs/bench_training", help="folder of the runs; it is kept")
    args = parser.parse_args()
    ways = {name: way for table in TABLES.values() for name, (way, _) in table.items()}
    base = {
        "steps": args.steps, "warmup_steps": args.steps // 7, "checkpoint_every": args.steps,
        "eval_every": args.steps, "eval_tokens": args.tokens,
    }  # fmt: skip
    arguments = {"steps": args.steps, "tokens": args.tokens}
    results = curves(RESULTS, arguments, args.run_dir, args.seeds, ways, base)
    print(markdown(results))
    plot(results, PLOT)


def final(text: str, curve: Curve) -> float:
    """Loss at the end of training."""
    return curve[-1][f"eval/{text}_lm_loss_nats"]


def markdown(results: dict[str, dict[str, Curve]]) -> str:
    """Tables of held-out losses, one for each question."""
    lines: list[str] = []
    for title, table in TABLES.items():
        lines += [f"{title}:", "", "| way | paper | Wikipedia leads | Django docs |", "|---|---|---|---|"]
        for name, (_, paper) in table.items():
            losses = " | ".join(spread(results[name], lambda curve, text=text: final(text, curve)) for text in TEXTS)
            lines.append(f"| {name} | {paper or ''} | {losses} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Curve]], path: Path) -> None:
    """Loss on the batches over tokens, the mean over the seeds, one panel a question."""
    figure = Figure(figsize=(5 * len(TABLES), 4.5), layout="constrained")
    for axes, (title, table) in zip(figure.subplots(1, len(TABLES)), TABLES.items(), strict=True):
        for name in table:
            runs = list(results[name].values())
            tokens = [point["tokens"] for point in runs[0]]
            losses = [sum(run[i][LM_LOSS] for run in runs) / len(runs) for i in range(len(tokens))]
            axes.plot(tokens, losses, label=name)
        axes.set(title=title, xlabel="tokens trained", ylabel="LM loss on the step's batch, nats per token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
