"""The distillation head, forward and backward: this package beside plain torch and Liger, in turn.

Forward KL of a bf16 student to a teacher, mean over the tokens; gradients to the student's hidden states and head.

Shape suffixes: N tokens, V vocabulary, H student width, G teacher width.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.distill.head import Way, liger, ours, plain
from bench.gpu import clock
from bench.gpu.record import Record
from compactlm_nemo.parallel.devices import device


class Sizes(NamedTuple):
    """Sizes of a pass."""

    tokens: int
    vocab: int
    teacher_width: int
    student_widths: tuple[int, ...]


REAL, TOY = Sizes(8192, 128256, 4096, (2048, 4096)), Sizes(96, 512, 64, (32, 64))
ROUNDS = 9
LEAST_TFLOPS = 600
MOST_PEAK_GB = 2
OURS = "this package"
CLOSE = 0.02
"""Largest relative difference of loss and gradients from plain torch: a few roundings of bf16, 2^-8 each."""


WAYS: dict[str, Callable[[], Way]] = {
    OURS: ours,
    "this package without kernels": partial(ours, False),
    "plain torch": plain,
    "Liger": partial(liger, False),
}
COMPILED: dict[str, Callable[[], Way]] = {OURS: ours, "Liger, compiled": partial(liger, True)}
"""Measured last, as it may compile for longer than there is time."""


class Subject:
    """A subject holds the inputs of a width and runs a way over them."""

    def __init__(self, sizes: Sizes, width: int) -> None:
        rng = torch.Generator(device()).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=rng, device=device()) * scale).to(torch.bfloat16)

        self.hidden_NH = normal(sizes.tokens, width).requires_grad_()
        self.weight_VH = normal(sizes.vocab, width, scale=width**-0.5).requires_grad_()
        self.teacher_NG = normal(sizes.tokens, sizes.teacher_width)
        self.teacher_VG = normal(sizes.vocab, sizes.teacher_width, scale=sizes.teacher_width**-0.5)
        self.labels_N = torch.randint(sizes.vocab, (sizes.tokens,), generator=rng, device=device())

    def once(self, way: Way) -> Tensor:
        """Return the loss; its gradients are in the leaves."""
        self.forget()
        loss = way(self.hidden_NH, self.weight_VH, self.teacher_NG, self.teacher_VG, self.labels_N)
        loss.backward()
        return loss.detach()

    def forget(self) -> None:
        """Free the gradients."""
        self.hidden_NH.grad = self.weight_VH.grad = None

    def outcome(self, way: Way) -> dict[str, Tensor]:
        """Return loss and gradients, of the head a part."""
        loss = self.once(way)
        assert self.hidden_NH.grad is not None and self.weight_VH.grad is not None
        parts = {"loss": loss, "hidden": self.hidden_NH.grad, "head": self.weight_VH.grad[:512]}
        return {name: part.float().clone() for name, part in parts.items()}

    def gradient_bytes(self) -> int:
        """Return the bytes of the gradients that a pass leaves behind."""
        return self.hidden_NH.nbytes + self.weight_VH.nbytes


def measure(record: Record, *, dry: bool) -> None:
    """Record time, speed and peak memory of every way at every width.

    Liger's compiled form is left out of a dry run: on a CPU it would compile C++ for minutes.
    """
    sizes = TOY if dry else REAL
    turns = [(ways, width) for ways in ([WAYS] if dry else [WAYS, COMPILED]) for width in sizes.student_widths]
    for number, (ways, width) in enumerate(turns):
        rest = record.seconds_left() * (1 - 1 / (len(turns) - number))
        _measure_width(record, sizes, width, ways, lambda rest=rest: record.seconds_left() - rest)
        clock.free()


def _measure_width(
    record: Record, sizes: Sizes, width: int, ways: dict[str, Callable[[], Way]], seconds_left: Callable[[], float]
) -> None:
    subject, usable = Subject(sizes, width), {}
    wanted = subject.outcome(plain())
    for name, make in ways.items():
        try:
            way = make()
            difference = _difference(subject.outcome(way), wanted)
            usable[name] = way
        except Exception as error:  # a tool that is missing or out of memory leaves the others
            record.failed(f"{name}, width {width}", error)
            continue
        finally:
            subject.forget()
            clock.free()
        record.detail(f"{name}, width {width}: relative difference from plain torch", difference)
        if not max(difference.values()) <= CLOSE:
            record.failed(f"{name}, width {width}", ValueError(f"differs from plain torch: {difference}"))
    runs = {name: partial(subject.once, way) for name, way in usable.items()}
    times = clock.in_turn(runs, ROUNDS, seconds_left)
    flops = (6 * width + 2 * sizes.teacher_width) * sizes.vocab * sizes.tokens
    for name in [name for name in runs if ways is WAYS or name != OURS]:
        subject.forget()
        peak = clock.peak_bytes(runs[name])
        _tell(record, name, width, times[name], flops, None if peak is None else peak - subject.gradient_bytes())


def _difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Return ``|got - wanted| / |wanted|`` of the loss and each gradient."""
    return {name: float((got[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted}


def _tell(record: Record, name: str, width: int, times: list[float], flops: int, peak: int | None) -> None:
    median = statistics.median(times)
    goals: dict[str, Any] = {"at_least": LEAST_TFLOPS} if name == OURS else {}
    record.detail(f"{name}, width {width}: ms", times)
    record.figure(f"{name}, width {width}", median, "ms")
    record.figure(f"{name}, width {width}", flops / median / 1e9, "TFLOP/s", **goals)
    if peak is not None:
        goals = {"at_most": MOST_PEAK_GB} if name == OURS else {}
        record.figure(f"{name}, width {width}: peak beside weights and gradients", peak / 1e9, "GB", **goals)
