"""Time and memory of the distillation head, forward and backward: this package, plain torch, and Liger.

    python -m bench.distill.linear_kd --hidden 576 --vocab 49152 --tokens 1024 2048 4096 --repeats 5
    python -m bench.distill.linear_kd --hidden 4096 --vocab 128256 --tokens 128 256 --repeats 2

fp32 on a CPU. Each way and plain torch, in processes of their own, take turns, so that a slow moment meets both; a
ratio is to plain torch in the same turn. Memory is the peak of a fresh process beside the heads
(bench/common/memory.py). Losses and gradients are compared before anything is timed. The first call
builds Liger's environment.

Prints Markdown and writes bench/results/linear_kd_HIDDENxVOCAB.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.common import memory
from bench.common.interleave import summary
from bench.common.venv import LIGER, interpreter
from bench.common.worker import Worker
from bench.distill.head import WAYS

RESULTS = Path(__file__).parents[1] / "results"


PLAIN = "plain torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576, help="width of both models")
    parser.add_argument("--vocab", type=int, default=49152, help="entries of the vocabulary")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens of a pass")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each way")
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {way: {str(tokens): {} for tokens in args.tokens} for way in WAYS}
    for tokens in map(str, args.tokens):
        timed(rows, args, tokens)
        for way in WAYS:
            with Worker(command(way, args), environment=memory.ENVIRONMENT) as worker:
                worker.seconds(str(min(args.tokens)))
                rows[way][tokens]["peak_bytes"] = worker.peak_bytes(tokens)
        RESULTS.mkdir(exist_ok=True)
        result = {"run": vars(args), "torch": torch.__version__, "ways": rows}
        (RESULTS / f"linear_kd_{args.hidden}x{args.vocab}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"measured {tokens} tokens", file=sys.stderr, flush=True)
    print(markdown(rows))


def command(way: str, args: argparse.Namespace) -> list[str]:
    """Returns the command line of the process of a way."""
    python = str(interpreter(LIGER)) if "Liger" in way else sys.executable
    sizes = [f"--hidden={args.hidden}", f"--vocab={args.vocab}", "--tokens", *map(str, args.tokens)]
    return [python, "-m", "bench.distill.head", f"--way={way}", *sizes]


def timed(rows: dict[str, dict[str, Any]], args: argparse.Namespace, tokens: str) -> None:
    """Takes the seconds of every way next to plain torch, in turns, once their losses and gradients agree."""
    for way in [way for way in WAYS if way != PLAIN]:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            workers = {name: stack.enter_context(Worker(command(name, args))) for name in (PLAIN, way)}
            for name, worker in workers.items():
                worker.seconds(tokens)  # warms up, and compiles
                worker.save_scores(tokens, Path(folder) / name)
            wanted, results = (load_file(Path(folder) / name) for name in workers)
            for name, result in results.items():
                gap = float((result - wanted[name]).norm() / wanted[name].norm())
                if gap > 1e-4:
                    raise SystemExit(f"{way}: {name} differs from plain torch by {gap:.1e}, relative.")
            seconds: dict[str, list[float]] = {name: [] for name in workers}
            for repeat in range(args.repeats):
                for name in list(workers) if repeat % 2 == 0 else list(workers)[::-1]:
                    seconds[name].append(workers[name].seconds(tokens))
        ratios = [this / plain for this, plain in zip(seconds[way], seconds[PLAIN], strict=True)]
        rows[way][tokens] |= {"seconds": summary(seconds[way]), "ratio": summary(ratios)}
        rows[PLAIN][tokens] |= {"seconds": summary(seconds[PLAIN]), "ratio": summary([1.0])}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Returns a table with one row a number of tokens and way."""
    lines = ["| tokens | way | seconds | time / plain torch (range) | peak beside heads, MiB | peak / plain torch |"]
    lines.append("|---|---|---|---|---|---|")
    for tokens, plain in rows[PLAIN].items():
        for way, measured in rows.items():
            row = measured[tokens]
            ratio = "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["ratio"])
            share = row["peak_bytes"] / plain["peak_bytes"]
            peak = f"{row['peak_bytes'] / 2**20:,.0f} | {share:.2f}"
            lines.append(f"| {tokens} | {way} | {row['seconds']['median']:.2f} | {ratio} | {peak} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
