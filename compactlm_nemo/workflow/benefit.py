"""Whether the student is worth the run, of a plan's figures: what is asked of the settings, and how it is said."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.config.model import Precision
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import CorrectConfig, TeacherSource
from compactlm_nemo.errors import ConfigError, listed
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.planning import benefit as figures
from compactlm_nemo.planning.benefit import Range, Verdict
from compactlm_nemo.planning.recoveries import RECOVERIES, SOURCES
from compactlm_nemo.search.cost import (
    answer_flops,
    cached_tokens,
    kv_cache_bytes_per_token,
    num_params,
    prompt_flops,
    read_params,
)

UNREACHABLE = "unreachable"
"""What is said of tokens and price where the scaling law has no number of tokens reach a loss."""


@dataclass(frozen=True, kw_only=True)
class Benefit:
    """What is found, in the terms of `planning/benefit.py`."""

    run: Config
    recovered: figures.Recovered
    extrapolated: tuple[str, ...]
    run_price: float
    scratch: dict[str, figures.FromScratch]
    """To the loss at the `low`, `middle` and `high` end of its range; a low loss takes most tokens."""
    scratch_utilisation: float
    """Share of the devices' peak that training the student without a teacher reaches in the plan's layout."""
    teacher: figures.Serving
    student: figures.Serving
    break_even: figures.BreakEven
    verdict: Verdict
    tokens_a_parameter: float
    removed: float

    def as_values(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "covered": figures.COVERED,
            "tokens_a_parameter": self.tokens_a_parameter,
            "removed": self.removed,
            "nats": figures.as_values(self.recovered.nats),
            "score": figures.as_values(self.recovered.score),
            "extrapolated": list(self.extrapolated),
            "run_price": self.run_price,
            "scratch": {name: figures.as_values(part) for name, part in self.scratch.items()},
            "scratch_utilisation": self.scratch_utilisation,
            "teacher": figures.as_values(self.teacher),
            "student": figures.as_values(self.student),
            "break_even": figures.as_values(self.break_even),
            "verdict": self.verdict.value,
            "sources": SOURCES,
        }

    def lines(self) -> list[str]:
        """Return what is printed."""
        nats, score = self.recovered.nats, self.recovered.score
        kept = Range(1 - score.middle, 1 - score.high, 1 - score.low)
        scratch = self.scratch
        tokens = Range(*(scratch[name].tokens for name in ("middle", "high", "low")))
        price = Range(*(scratch[name].price for name in ("middle", "high", "low")))
        return [
            f"worth it? Ranges in brackets are meant to hold {figures.COVERED:.0%} of runs.",
            f"loss: {nats.middle:.2f} nats a token over the teacher's ({nats.low:.2f} to {nats.high:.2f}), scores "
            f"{kept.middle:.0%} of the teacher's ({kept.low:.0%} to {kept.high:.0%}), after "
            f"{self.tokens_a_parameter:.3g} tokens a parameter with {self.removed:.0%} removed",
            *[f"extrapolated: {reason}" for reason in self.extrapolated],
            f"this run: ${self.run_price:,.2f}",
            f"from scratch to the same loss: {_count(tokens.middle)} tokens ({_count(tokens.low)} to "
            f"{_count(tokens.high)}), {_dollars(price.middle)} ({_dollars(price.low)} to {_dollars(price.high)}) at "
            f"{self.scratch_utilisation:.0%} MFU",
            *[
                f"serving the {name}: ${each.price_million:.4f} a million tokens; {each.devices} "
                f"device{'s' * (each.devices > 1)} a copy, decoding bound by "
                f"{'memory' if each.is_memory_bound else 'arithmetic'}"
                for name, each in (("teacher", self.teacher), ("student", self.student))
            ],
            f"break-even: {self._break_even()}",
            f"{self.verdict.value}: {self._reasons()}",
        ]

    def _break_even(self) -> str:
        if math.isinf(self.break_even.tokens):
            return "never, as serving the student costs no less"
        return f"{_count(self.break_even.tokens)} tokens, {self.break_even.days:,.1f} days"

    def _reasons(self) -> str:
        plan = self.run.plan
        days, cheap, dear = self.break_even.days, self.scratch["high"].price, self.scratch["low"].price
        pays = "pays for the run within" if days <= plan.served_days else "does not pay for the run within"
        if self.run_price < cheap:
            beside = "costs less than one from scratch at either end of the range"
        elif self.run_price >= dear:
            beside = "costs no less than one from scratch at either end of the range"
        else:
            beside = (
                "costs less than one from scratch if it ends at a low loss of the range and more if at a high one: a "
                "short distillation of this student would tell"
            )
        return (
            f"serving {_count(plan.served_tokens_day or 0)} tokens a day {pays} {plan.served_days:g} days, and the run "
            f"{beside}. Whether {self.recovered.nats.middle:.2f} to {self.recovered.nats.high:.2f} nats more are good "
            f"enough is not decided here, and what the teacher cost is spent. This rests on {len(RECOVERIES)} students "
            f"of {len(SOURCES)} teachers, on Hoffmann's scaling law as fitted by Besiroglu et al. 2024, and on the "
            f"prices, peaks and shares of {self.run.cluster.device}; nothing of it was measured on this run."
        )


def check_benefit(run: Config, teacher: Dims, student: Dims) -> None:
    """Refuse what no benefit can be told of, before anything is simulated.

    Raises:
        ConfigError: one line for every broken rule.
    """
    longest = run.plan.served_prompt + run.plan.served_answer
    problems = {
        "cluster.price_hour=0 is not known, and plan.benefit=true compares prices; give cluster.price_hour=DOLLARS.": (
            run.cluster.price_hour == 0
        ),
        "plan.benefit=true knows distilled students alone, not those of distill.teacher=none; choose another.": (
            run.distill.teacher is TeacherSource.none
        ),
        f"plan.benefit=true does not know the tokens before distill.start_from={run.distill.start_from}; leave one "
        "of them out.": run.distill.start_from is not None,
        f"plan.benefit=true knows no model with experts, as num_experts={teacher.num_experts}; leave it out.": (
            teacher.num_experts > 0
        ),
        "plan.benefit=true needs a student with fewer parameters than the teacher; give search.* sizes.": (
            num_params(student) >= num_params(teacher)
        ),
        f"plan.served_prompt={run.plan.served_prompt} and plan.served_answer={run.plan.served_answer} must be at most "
        f"max_position_embeddings={teacher.max_position_embeddings} together; lower one of them.": (
            longest > teacher.max_position_embeddings
        ),
    }
    if broken := [line for line, is_broken in problems.items() if is_broken]:
        raise ConfigError(listed(broken))
    _served_both(run, teacher, student)


def benefit(run: Config, teacher: Dims, student: Dims, world: int, run_price: float) -> Benefit:
    """Return whether the student is worth the run, whose layout is planned and whose stages cost `run_price`."""
    assert run.plan.teacher_tokens is not None and run.plan.served_tokens_day is not None
    sizes = num_params(teacher), num_params(student)
    tokens = run.distill.steps * run.distill.global_batch * run.data.sequence_length
    recovered = figures.expected_recovery(*sizes, tokens)
    price_a_token, utilisation = _training_alone(run, student, world)
    scratch = {
        end: figures.from_scratch(
            getattr(recovered.nats, end), sizes[0], run.plan.teacher_tokens, sizes[1], price_a_token
        )
        for end in ("low", "middle", "high")
    }
    teacher_served, student_served = _served_both(run, teacher, student)
    paid = figures.break_even(run_price, teacher_served, student_served, run.plan.served_tokens_day)
    return Benefit(
        run=run,
        recovered=recovered,
        extrapolated=(*recovered.outside, *_unlike_the_sources(run, sizes, scratch["middle"].tokens)),
        run_price=run_price,
        scratch=scratch,
        scratch_utilisation=utilisation,
        teacher=teacher_served,
        student=student_served,
        break_even=paid,
        verdict=figures.verdict(run_price, scratch["high"], scratch["low"], paid.days, run.plan.served_days),
        tokens_a_parameter=tokens / sizes[1],
        removed=1 - sizes[1] / sizes[0],
    )


def _unlike_the_sources(run: Config, sizes: tuple[int, int], scratch_tokens: float) -> list[str]:
    """Return in what the run differs from those that the expected loss and the scaling law are of."""
    assert run.plan.teacher_tokens is not None
    reasons = []
    if run.distill.loss != LossConfig() or run.distill.hidden.is_on:
        reasons.append("the sources train by forward KL on logits alone, this run does not")
    trained = {"the teacher": (sizes[0], run.plan.teacher_tokens), "a run from scratch": (sizes[1], scratch_tokens)}
    for name, (params, tokens) in trained.items():
        if figures.outside_law(params, tokens):
            reasons.append(
                f"{name} has {_count(params)} parameters and {_count(tokens)} tokens, the scaling law is of 70 million "
                "to 16 billion and of 5 to 500 billion"
            )
    return reasons


def _training_alone(run: Config, student: Dims, world: int) -> tuple[float, float]:
    """Return what a token costs where the student's shape is trained without a teacher, and the share of the peak."""
    from compactlm_nemo.planning.estimate import estimate
    from compactlm_nemo.planning.planned import planned_stages

    alone = replace(run, correct=CorrectConfig(steps=1))  # the one stage that trains a model by itself
    planned = planned_stages(alone, student, student, world)["correct_teacher"]
    row = estimate(planned, alone, student, student, world=world)
    utilisation = row.parts[0].utilisation(run.cluster, world, world // run.parallel.model_ranks)
    return world * run.cluster.price_hour / 3600 / row.tokens_per_second, utilisation


def _served_both(run: Config, teacher: Dims, student: Dims) -> tuple[figures.Serving, figures.Serving]:
    """Return what serving teacher and student takes, in the run's number format."""
    plan, is_bf16 = run.plan, run.model.precision is Precision.bf16
    load = figures.Load(plan.served_prompt, plan.served_answer, plan.served_batch)
    tflops = run.cluster.bf16_tflops if is_bf16 else run.cluster.fp32_tflops
    first, second = (
        figures.serving(
            served(name, dims, load, 2 if is_bf16 else 4), load, run.cluster, tflops=tflops, margin=plan.margin
        )
        for name, dims in (("teacher", teacher), ("student", student))
    )
    return first, second


def served(name: str, dims: Dims, load: figures.Load, bytes_per_value: int) -> figures.Served:
    """Return a model while it serves a load."""

    def cache(context: int) -> int:
        return cached_tokens(dims, context) * kv_cache_bytes_per_token(dims, bytes_per_value)

    whole = load.prompt + load.answer
    return figures.Served(
        name=name,
        weight_bytes=num_params(dims) * bytes_per_value,
        read_bytes=read_params(dims) * bytes_per_value,
        cache_bytes=cache(load.prompt + load.answer // 2),
        full_cache_bytes=cache(whole),
        prompt_flops=prompt_flops(dims, load.prompt),
        answer_flops=answer_flops(dims, load.prompt, load.answer),
    )


def _count(number: float) -> str:
    if math.isinf(number):
        return UNREACHABLE
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number:,.0f}"


def _dollars(price: float) -> str:
    return UNREACHABLE if math.isinf(price) else f"${price:,.2f}"
