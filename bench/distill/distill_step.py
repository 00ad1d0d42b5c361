"""This command measures what a distillation step costs over a plain training step, next to what the FLOPs say.

    python -m bench.distill.distill_step --samples 8 --repeats 5

The bundled teacher and a student of the default experiment's shape, in one process: forward and backward over the same
samples, with cross entropy and no teacher, and with the forward KL to the live teacher. The two take turns, and a ratio
is to the mean of the plain steps before and after. Prints Markdown and writes bench/results/distill_step.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common.interleave import summary
from bench.common.teacher import PRECISIONS, add_run_arguments, calibration_tokens, our_model
from compactlm_nemo.config.loss import CROSS_ENTROPY, LossConfig
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.distill.teacher import LiveTeacher, NoTeacher, Teacher
from compactlm_nemo.losses.linear_kd import linear_kd
from compactlm_nemo.losses.targets import TeacherHead
from compactlm_nemo.models.build import build_model
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.search.cost import flops_per_token_forward
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.optimizer import wrap_data_parallel

RESULTS = Path(__file__).parents[1] / "results" / "distill_step.json"


SHAPE = {"layers": 23, "ffn": 1296}


class Subject:
    """A subject holds teacher, student and batches."""

    def __init__(self, mesh: Mesh, args: argparse.Namespace) -> None:
        dtype = PRECISIONS[args.precision]
        self.mesh, self.length = mesh, args.sequence_length
        self.teacher_dims, chunks = our_model(mesh, dtype)
        self.dims = self.teacher_dims.with_shape(**SHAPE)
        self.teacher = LiveTeacher(chunks)
        # Its weights decide no time: they stay as they were initialised.
        student = build_model(self.dims, mesh, dtype=dtype, vocab_multiple=128)
        self.ddps = wrap_data_parallel(student.train())
        tokens = calibration_tokens(args)
        tokens = torch.cat([tokens, tokens[:, :1]], dim=1)  # a label for the last input
        self.batches = [Batch(part, ()) for part in tokens.split(args.micro_batch)]

    def step(self, teacher: Teacher, loss: LossConfig) -> None:
        """Runs forward and backward over all batches."""
        settings: dict[str, Any] = {"loss": loss, "temperature": 1.0}
        forward_backward(self.ddps, teacher, self.batches, **settings)

    def head(self) -> None:
        """Runs the loss head of a step alone, forward and backward, on hidden states of a step's sizes."""
        weight_VH = self.ddps.head_weight.detach().requires_grad_()
        head = replace(self.ddps.head(), weight_VH=weight_VH)
        for batch in self.batches:
            labels_N = batch.tokens_BT[:, 1:].T.flatten()
            student_NH, teacher_NG = (
                torch.zeros(len(labels_N), dims.hidden_size, dtype=weight_VH.dtype).normal_()
                for dims in (self.dims, self.teacher_dims)
            )
            targets, mask_N = TeacherHead(teacher_NG, self.teacher.chunks.head_weight), torch.ones(len(labels_N))
            losses = linear_kd(student_NH.requires_grad_(), head, targets, labels_N, mask_N, loss=LossConfig())
            losses.loss_sum.backward()

    def ideal(self) -> float:
        """Returns the ratio of the FLOPs of both steps, distillation to plain: a backward pass is two forward ones."""
        student, teacher = (flops_per_token_forward(dims, self.length) for dims in (self.dims, self.teacher_dims))
        return (3 * student + teacher) / (3 * student)


def seconds(run: Callable[[], Any]) -> float:
    """Returns the wall time of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each kind")
    args = parser.parse_args()
    subprocess.run([sys.executable, "-m", "bench.common.teacher"], check=True)
    with launched(ParallelConfig(), seed=1) as mesh:
        subject = Subject(mesh, args)
        runs = {
            "plain": partial(subject.step, NoTeacher(mesh), CROSS_ENTROPY),
            "distillation": partial(subject.step, subject.teacher, LossConfig()),
            "teacher": partial(subject.teacher.targets, subject.batches),
            "head": subject.head,
        }
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        ratios = []
        for _ in range(args.repeats):
            before, during, after = (seconds(runs[name]) for name in ("plain", "distillation", "plain"))
            times["plain"] += [before, after]
            times["distillation"].append(during)
            for name in ("teacher", "head"):
                times[name].append(seconds(runs[name]))
            ratios.append(2 * during / (before + after))
        result = {
            "run": vars(args), "threads": torch.get_num_threads(), "ideal": subject.ideal(), "ratio": summary(ratios),
            "seconds": {name: summary(values) for name, values in times.items()},
        }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """Returns a table of the times, and the ratio next to the ideal."""
    lines = ["| step | seconds, median (range) |", "|---|---|"]
    for name, row in result["seconds"].items():
        lines.append(f"| {name} | {row['median']:.2f} ({row['min']:.2f} to {row['max']:.2f}) |")
    ratio = "{median:.3f} ({min:.3f} to {max:.3f})".format(**result["ratio"])
    over = result["ratio"]["median"] / result["ideal"] - 1
    whole = result["seconds"]["distillation"]["median"]
    teacher, head = (result["seconds"][part]["median"] / whole for part in ("teacher", "head"))
    lines += ["", f"Distillation over plain: {ratio}; by FLOPs {result['ideal']:.3f}, so {over:+.1%}. "]
    shares = f"teacher's layers {teacher:.0%}, both heads and the loss {head:.0%}, student's layers the rest"
    return "\n".join([*lines, f"Of the distillation step: {shares}."])


if __name__ == "__main__":
    main()
