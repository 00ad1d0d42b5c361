"""Whether a student is worth its run: the loss to expect, a run from scratch to the same loss, what serving saves.

Numbers in, numbers out. Every figure is an estimate; those of losses have a range, from how far the sources lie from a
line through the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np

from compactlm_nemo.config.cluster import ClusterConfig
from compactlm_nemo.errors import require
from compactlm_nemo.planning.recoveries import RECOVERIES, Recovery, Unit

COVERED = 0.9
"""Share of students that a range is meant to hold."""
GIB = 2**30


@dataclass(frozen=True)
class Range:
    """A figure, and the range that it is meant to lie in."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Recovered:
    """What a student is expected to lack of its teacher."""

    nats: Range
    """KL(teacher || student) a token; about the rise of the loss."""
    score: Range
    """Share of the teacher's mean benchmark score."""
    outside: tuple[str, ...]
    """In what the student lies outside of the students whose KL is known; empty where it does not."""


def _features(unit: Unit, teacher_params: float, student_params: float, tokens: float) -> list[float]:
    """Return 1, ln tokens a parameter, ln share of parameters removed, and 1 for scores."""
    removed = 1 - student_params / teacher_params
    return [1.0, math.log(tokens / student_params), math.log(removed), float(unit is Unit.score)]


def _design(rows: Sequence[Recovery]) -> tuple[np.ndarray, np.ndarray]:
    features = [_features(row.unit, row.teacher_params, row.student_params, row.tokens) for row in rows]
    return np.array(features), np.log([row.gap for row in rows])


def expected_recovery(
    teacher_params: float, student_params: float, tokens: float, rows: Sequence[Recovery] = RECOVERIES
) -> Recovered:
    """Return what a student lacks after `tokens`, by least squares on the logarithms of the rows.

    ``gap = c_unit (tokens / student)^-b removed^d``, removed = 1 - student / teacher; one b and d for both units. That
    the gap is a power of the share removed, and falls with a power of the tokens, is the form of P2 Law (Chen et al.
    2024, arXiv 2411.10272), here without its floor. The range is
    ``t s sqrt(1 + x' (X'X)^-1 x)`` on both sides of the logarithm: t of Student's distribution at `COVERED` with as
    many degrees as rows beyond the four coefficients, s the root mean square of the errors when each source is
    foretold by the others, as students of one source are alike.
    """
    from scipy.stats import t as student_t

    features, logs = _design(rows)
    coefficients = np.linalg.lstsq(features, logs, rcond=None)[0]
    inverse = np.linalg.pinv(features.T @ features)
    quantile = float(student_t.ppf((1 + COVERED) / 2, len(rows) - features.shape[1]))
    spread = quantile * _error_of_new_sources(rows)
    ranges = {}
    for unit in Unit:
        point = np.array(_features(unit, teacher_params, student_params, tokens))
        middle = float(point @ coefficients)
        half = spread * math.sqrt(1 + float(point @ inverse @ point))
        ranges[unit] = Range(math.exp(middle), math.exp(middle - half), math.exp(middle + half))
    lacking = ranges[Unit.score]
    score = Range(*(min(1.0, part) for part in (lacking.middle, lacking.low, lacking.high)))  # no more than all of it
    outside = tuple(_outside(teacher_params, student_params, tokens, rows))
    return Recovered(ranges[Unit.nats], score, outside)


def _error_of_new_sources(rows: Sequence[Recovery]) -> float:
    """Return the root mean square error of logarithms where all rows of a source are foretold by the other sources."""
    errors: list[float] = []
    for source in sorted({row.source for row in rows}):
        others, others_logs = _design([row for row in rows if row.source != source])
        features, logs = _design([row for row in rows if row.source == source])
        errors += list(logs - features @ np.linalg.lstsq(others, others_logs, rcond=None)[0])
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def _outside(teacher_params: float, student_params: float, tokens: float, rows: Sequence[Recovery]) -> list[str]:
    """Return in what a student lies outside of the rows in nats."""
    known = [row for row in rows if row.unit is Unit.nats]
    spans = {
        "tokens a parameter": (tokens / student_params, [row.tokens / row.student_params for row in known]),
        "share of parameters removed": (
            1 - student_params / teacher_params, [1 - row.student_params / row.teacher_params for row in known],
        ),
        "parameters of the student": (student_params, [row.student_params for row in known]),
    }  # fmt: skip
    return [
        f"{name} {value:.3g}, known from {min(values):.2g} to {max(values):.2g}"
        for name, (value, values) in spans.items()
        if not min(values) <= value <= max(values)
    ]


@dataclass(frozen=True)
class ScalingLaw:
    """Loss of a dense model of N parameters that was trained on D tokens: ``floor + a N^-alpha + b D^-beta``, nats."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, params: float, tokens: float) -> float:
        """Return the loss of a model of `params` after `tokens`."""
        return self.floor + self.a * params**-self.alpha + self.b * tokens**-self.beta

    def tokens_to(self, loss: float, params: float) -> float:
        """Return the tokens that a model needs to this loss; infinity where its size alone keeps it above."""
        left = loss - self.floor - self.a * params**-self.alpha
        return math.inf if left <= 0 else (self.b / left) ** (1 / self.beta)


CHINCHILLA = ScalingLaw(floor=1.8172, a=482.01, alpha=0.3478, b=2085.43, beta=0.3658)
"""Form and runs of Hoffmann et al. 2022 (arXiv 2203.15556, approach 3), fitted anew by Besiroglu et al. 2024 (arXiv
2404.10102); standard errors 0.03, 124.58, 0.02, 1293.23, 0.02."""
LAW_PARAMS, LAW_TOKENS = (70e6, 16e9), (5e9, 500e9)
"""Sizes and tokens of those runs, by the abstract."""


@dataclass(frozen=True)
class FromScratch:
    """A run of the student's shape from random weights to the loss that distillation is expected to reach."""

    tokens: float
    """Infinity where the law has the student reach this loss with no number of tokens."""
    flops: float
    """6 N D."""
    price: float


def from_scratch(
    gap: float, teacher_params: float, teacher_tokens: float, student_params: float, price_a_token: float
) -> FromScratch:
    """Return that run, where the loss is the law's of the teacher plus `gap` nats."""
    target = CHINCHILLA.loss(teacher_params, teacher_tokens) + gap
    tokens = CHINCHILLA.tokens_to(target, student_params)
    return FromScratch(tokens, 6 * student_params * tokens, price_a_token * tokens)


def outside_law(params: float, tokens: float) -> bool:
    """Whether a model lies outside of the runs that the scaling law is of."""
    return not (LAW_PARAMS[0] <= params <= LAW_PARAMS[1] and LAW_TOKENS[0] <= tokens <= LAW_TOKENS[1])


@dataclass(frozen=True)
class Load:
    """Requests that a model serves."""

    prompt: int
    """Tokens of a prompt."""
    answer: int
    """Tokens that are generated for it."""
    batch: int
    """Requests that are generated at once."""


@dataclass(frozen=True)
class Served:
    """A model while it serves a load, in FLOPs and bytes."""

    name: str
    weight_bytes: float
    """All weights."""
    read_bytes: float
    """Weights that a decoding step reads: all but the rows of an embedding table of its own."""
    cache_bytes: float
    """Keys and values of a request, the mean while it is answered."""
    full_cache_bytes: float
    """The same at its end."""
    prompt_flops: float
    """Of a prompt, with the logits of its last token alone."""
    answer_flops: float
    """Of an answer."""


@dataclass(frozen=True)
class Serving:
    """What serving a model takes at the least."""

    devices: int
    """Devices of one copy, a power of two, that hold weights and batch."""
    prompt_seconds: float
    """Device seconds of a prompt."""
    step_seconds: float
    """Device seconds of a decoding step of the whole batch."""
    is_memory_bound: bool
    """Whether a step takes its bytes, and not its arithmetic."""
    price_million: float
    """Dollars a million generated tokens, prompts included."""


def serving(model: Served, load: Load, cluster: ClusterConfig, *, tflops: float, margin: float) -> Serving:
    """Return what a roofline says of serving: prompts take arithmetic, steps the longer of bytes and arithmetic.

    ``prompt = FLOPs / (peak matmul_share)``, ``step = max(bytes / (bandwidth memory_share), FLOPs / (peak
    matmul_share))``; a token costs ``(prompt + answer / batch step) / answer`` seconds of a device. Devices of a copy
    share both evenly and links take nothing, so their number changes no price; no device waits for requests.

    Raises:
        ConfigError: no number of devices of a node holds the model and its batch.
    """
    rate = tflops * 1e12 * cluster.matmul_share
    bandwidth = cluster.memory_gbs * 1e9 * cluster.memory_share
    needed = model.weight_bytes + load.batch * model.full_cache_bytes
    room = cluster.usable_bytes(margin)
    devices = 1
    while needed > devices * room:
        devices *= 2
        require(
            devices <= cluster.devices_per_node,
            f"plan.served_batch={load.batch} of the {model.name} needs {needed / GIB:,.1f} GiB, more than the "
            f"{cluster.devices_per_node} devices of a node have free; lower it, or plan.served_prompt.",
        )
    prompt = model.prompt_flops / rate
    moving = (model.read_bytes + load.batch * model.cache_bytes) / bandwidth
    computing = load.batch * model.answer_flops / load.answer / rate
    step = max(moving, computing)
    a_token = prompt / load.answer + step / load.batch
    return Serving(devices, prompt, step, moving >= computing, a_token / 3600 * cluster.price_hour * 1e6)


@dataclass(frozen=True)
class BreakEven:
    """When what a student saves in serving has paid for its run; infinity where it saves nothing."""

    tokens: float
    """Generated tokens."""
    days: float


def break_even(run_price: float, teacher: Serving, student: Serving, tokens_day: float) -> BreakEven:
    """Return when serving the student has saved the run's price: ``run / (teacher - student)`` generated tokens."""
    saved = (teacher.price_million - student.price_million) / 1e6
    tokens = run_price / saved if saved > 0 else math.inf
    return BreakEven(tokens, tokens / tokens_day)


class Verdict(Enum):
    """go, no_go, or open where the range of the loss decides."""

    go = "go"
    open = "open"
    no_go = "no-go"


def verdict(run_price: float, cheapest: FromScratch, dearest: FromScratch, days: float, served_days: float) -> Verdict:
    """Return go where the run pays back in time and costs less than one from scratch whatever loss it ends at.

    Args:
        cheapest: From scratch to the worst loss of the range; `dearest` to the best.
        days: Until serving has paid for the run.
    """
    if days > served_days or run_price >= dearest.price:
        return Verdict.no_go
    return Verdict.go if run_price < cheapest.price else Verdict.open


def as_values(figures: Any) -> dict[str, Any]:
    """Return figures as plain values, None for infinity, which JSON does not have."""
    return {name: _finite(value) for name, value in asdict(figures).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value
