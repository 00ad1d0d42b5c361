"""Does the gain of refitting survive training? Tokens that a plainly cut and a refitted student need for equal losses.

    python -m bench.distill.recovery --steps 100

The default experiment's student, cut plainly and refitted, trained by forward KL on the same tokens in the same order
with schedules of several lengths; the refitted one at several peak rates, as it starts nearer to the teacher.
bench/results/recovery.json has what is finished so far, and a second call goes on from there. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.distill.orderings import final
from bench.distill.training import Way, curves

RESULTS = Path(__file__).parents[1] / "results" / "recovery.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--steps", type=int, default=100, help="steps of 1,024 tokens of the plainly cut student")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5], help="shorter schedules of both")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-4], help="peak rates of the refitted one")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens of each text")
    parser.add_argument("--run-dir", default="runs/bench_training", help="folder of the runs; it is kept")
    args = parser.parse_args()
    ways = {f"plain, {args.steps} steps": Way(student="width", settings=schedule(args.steps, 5e-4))}
    for steps in [round(args.steps * share) for share in args.shares]:
        ways[f"plain, {steps} steps"] = Way(student="width", settings=schedule(steps, 5e-4))
        for rate in args.rates:
            ways[f"refitted, {steps} steps, {rate:g}"] = Way(student="refitted", settings=schedule(steps, rate))
    results = curves(RESULTS, {"tokens": args.tokens}, args.run_dir, [args.seed], ways, {"eval_tokens": args.tokens})
    print("| student | tokens | Wikipedia leads | Django docs |", "|---|---|---|---|", sep="\n")
    for name in results:
        (curve,) = results[name].values()
        print(f"| {name} | {curve[-1]['tokens']:,.0f} | {final('wiki', curve):.3f} | {final('django', curve):.3f} |")


def schedule(steps: int, rate: float) -> dict[str, float | int]:
    """Settings of a training of `steps` steps whose rate falls to a tenth of its peak."""
    return {
        "steps": steps, "warmup_steps": steps // 20, "lr": rate, "min_lr": rate / 10,
        "checkpoint_every": steps, "eval_every": -(-steps // 4),
    }  # fmt: skip


if __name__ == "__main__":
    main()
