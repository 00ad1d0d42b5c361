"""What importance scoring costs on top of a forward pass: this package against NVIDIA Model-Optimizer's Minitron.

    python -m bench.importance --samples 8 --repeats 5

Same machine, same weights, same tokens, same Megatron-Core and torch build. Each tool is compared with its own model's
forward pass without hooks; Model-Optimizer twice, on the model it ships with and on ours (bench/common/minitron.py).
Times are interleaved (bench/common/interleave.py), memory is the peak of a fresh process (bench/common/memory.py). The
first call builds Model-Optimizer's environment in bench/.venv-modelopt and fetches the bundled teacher.

Prints Markdown and writes bench/results/importance.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.common import memory
from bench.common.interleave import Group, measure
from bench.common.teacher import add_run_arguments
from bench.common.venv import MODEL_OPTIMIZER, interpreter
from bench.common.worker import Worker
from bench.importance.agreement import agree
from bench.importance.tables import tables

RESULTS = Path(__file__).parents[1] / "results" / "importance.json"


KINDS = {
    "shipped": "Model-Optimizer, its model (unfused attention, logits)",
    "same_forward": "Model-Optimizer, our model",
}


COMPARED = "width l2_mean + bi"
"""Our pass that measures what Model-Optimizer measures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each kind")
    parser.add_argument("--only", nargs="*", metavar="PASS", help=f"of our passes, besides {COMPARED!r}: these")
    parser.add_argument("--skip-memory", action="store_true", help="times and agreement only")
    args = parser.parse_args()
    subprocess.run([sys.executable, "-m", "bench.common.teacher"], check=True)
    commands = worker_commands(args)
    result = {"model": "SmolLM2-135M-Instruct (Q4_1, dequantised)", "run": vars(args)} | timed(args, commands)
    _write(result)  # an interrupted measurement of memory leaves the times
    if not args.skip_memory:
        for group, command in zip(result["groups"], commands, strict=True):
            add_memory(group, command)
        _write(result)
    print(tables(result))


def worker_commands(args: argparse.Namespace) -> list[list[str]]:
    """Our worker's command line, then Model-Optimizer's for each kind of model."""
    shared = [
        f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in ("samples", "sequence_length", "micro_batch", "precision")
    ]
    theirs = [str(interpreter(MODEL_OPTIMIZER)), "-m", "bench.common.minitron", *shared, "--model"]
    return [[sys.executable, "-m", "bench.importance.ours", *shared], *([*theirs, kind] for kind in KINDS)]


def timed(args: argparse.Namespace, commands: list[list[str]]) -> dict[str, Any]:
    """Times of all passes, with all tools' processes alive, and the agreement of the scores."""
    with (
        Worker(commands[0]) as own,
        Worker(commands[1]) as shipped,
        Worker(commands[2]) as same_forward,
        tempfile.TemporaryDirectory() as folder,
    ):
        passes = [name for name in own.about["passes"] if name not in ("bare", "warm_up")]
        wanted = [name for name in passes if args.only is None or name == COMPARED or name in args.only]
        groups = [
            Group(own, "this package", wanted),
            Group(shipped, KINDS["shipped"], ["scored"]),
            Group(same_forward, KINDS["same_forward"], ["scored"]),
        ]
        for group in groups:
            group.worker.seconds("warm_up")
        for repeat in measure(groups, args.repeats):
            _note(f"timed {repeat} of {args.repeats}")
        own.save_scores(COMPARED, Path(folder) / "own")
        same_forward.save_scores("scored", Path(folder) / "theirs")
        agreement = agree(load_file(Path(folder) / "own"), load_file(Path(folder) / "theirs"))
        machine = {"processor": _processor(), "torch": torch.__version__, "threads": own.about["threads"]}
        machine["baseline"] = shipped.about["tool"]
    return {"machine": machine, "groups": [group.result() for group in groups], "agreement": agreement}


def add_memory(group: dict[str, Any], command: list[str]) -> None:
    """Peaks of a group's passes, each in a new process; `extra_peak_bytes` is what a pass needs more than the bare."""
    bare = group["bare"]["peak_bytes"] = _peak(command, "bare")
    for name, row in group["scored"].items():
        row["extra_peak_bytes"] = _peak(command, name) - bare


def _peak(command: list[str], name: str) -> int:
    _note(f"memory of {command[2]}: {name}")
    with Worker(command, environment=memory.ENVIRONMENT) as worker:
        worker.seconds("warm_up")
        return worker.peak_bytes(name)


def _write(result: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match[1] if match else platform.processor()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
