"""Holds what a run has measured against the limits of the gate: a verdict for each limit and metric, PASS or FAIL."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console

from compactlm_nemo.config.gate import Compared, GateRunConfig, LimitConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError, GateFailed, listed
from compactlm_nemo.report.figures import FORWARD_SPEED, PARAMS, SERVED, Figure, Measured, measured
from compactlm_nemo.report.tables import print_table

OF_HELDOUT_TEXTS = ("loss", "top1_agreement", "kl")
"""Kinds of metrics that are measured on every held-out text, under its name."""
OTHER_KINDS = (
    "choices", "ece", "brier", "bias_ambiguous", "bias_disambiguated", "accuracy_ambiguous", "accuracy_disambiguated",
    "distinct_4", "loops", "task", *SERVED.values(),
)  # fmt: skip
_SHOWN = 5


@dataclass(frozen=True)
class Verdict:
    """A `Verdict` says whether one metric keeps one limit."""

    limit: str
    metric: str
    model: str
    compare: str
    value: float | None
    """None where the model has no such number; that keeps no limit."""
    low: float | None
    high: float | None
    at_least: float | None
    at_most: float | None
    confident: bool
    passed: bool

    @property
    def must_be(self) -> str:
        """The rule in words: `at most 0.2, confident`."""
        ends = [(self.at_least, "at least"), (self.at_most, "at most")]
        words = " and ".join(f"{word} {bound:g}" for bound, word in ends if bound is not None)
        return words + (", to the interval's end" if self.confident else "")

    def row(self) -> dict[str, Any]:
        """Return the line of a table."""
        what = {"value": "", "against_teacher": " - teacher's", "ratio": " / teacher's"}[self.compare]
        return {
            "limit": self.limit,
            "of": f"{self.metric}, {self.model}{what}",
            "measured": None if self.value is None else f"{self.value:.4g}",
            "interval": None if self.low is None or self.high is None else f"{self.low:.4g} to {self.high:.4g}",
            "must be": self.must_be,
            "verdict": "PASS" if self.passed else "FAIL",
        }


def judge(limits: Mapping[str, LimitConfig], found: Mapping[str, Measured], run: Path) -> list[Verdict]:
    """Return a verdict for each metric that each limit matches.

    Raises:
        ConfigError: a limit matches no metric of the run, or needs an interval that a metric has not.
    """
    problems, verdicts = [], []
    for name, limit in limits.items():
        names = [metric for metric in found if _matches(metric, limit.metric)]
        if not names:
            problems.append(_unmatched(name, limit, list(found), f"what {run} has measured"))
        for metric in names:
            figure = _compared(found[metric], limit)
            if limit.confident and figure is not None and None in (figure.low, figure.high):
                problems.append(
                    f"gate.limits.{name}.confident=true needs an interval, which {metric} of {run} has not; measure "
                    "more documents, questions or continuations, or leave it out."
                )
            verdicts.append(_verdict(name, metric, limit, figure))
    if problems:
        raise ConfigError(listed(problems))
    return verdicts


def _matches(metric: str, pattern: str) -> bool:
    """Whether a pattern is of a metric: `loss/*` is of `loss/wiki`, and not of its slice `loss/wiki/short`."""
    parts, patterns = metric.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _whole(pattern: str) -> str:
    """Return the pattern of the text whose slice a pattern is of."""
    return "/".join(pattern.split("/")[:2])


def _compared(metric: Measured, limit: LimitConfig) -> Figure | None:
    model = limit.model.name
    if limit.compare is Compared.ratio:
        return metric.ratio(model)
    return (metric.models if limit.compare is Compared.value else metric.against_teacher).get(model)


def _verdict(name: str, metric: str, limit: LimitConfig, figure: Figure | None) -> Verdict:
    passed = figure is not None
    if figure is not None:
        lowest, highest = (figure.low, figure.high) if limit.confident else (figure.value, figure.value)
        passed = (limit.at_least is None or (lowest is not None and lowest >= limit.at_least)) and (
            limit.at_most is None or (highest is not None and highest <= limit.at_most)
        )
    value, low, high = figure or (None, None, None)
    return Verdict(
        limit=name, metric=metric, model=limit.model.name, compare=limit.compare.name, value=value, low=low, high=high,
        at_least=limit.at_least, at_most=limit.at_most, confident=limit.confident, passed=passed,
    )  # fmt: skip


def _unmatched(name: str, limit: LimitConfig, known: Sequence[str], whose: str) -> str:
    """Return the line about a metric that is not there, with names that are near."""
    near = difflib.get_close_matches(limit.metric, [*known, *{_kind_pattern(each) for each in known}], n=3, cutoff=0.5)
    shown = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
    hint = f"did you mean {' or '.join(near)}?" if near else f"there is {shown or 'nothing'}."
    return (
        f"gate.limits.{name}.metric={limit.metric} is not among {whose}; {hint} Correct the name, measure it, or "
        "choose a gate without it."
    )


def _kind_pattern(metric: str) -> str:
    kind, *parts = metric.split("/")
    return "/".join([kind, *["*"] * len(parts)])


def gate_problems(limits: Mapping[str, LimitConfig], config: Config) -> list[str]:
    """Return the limits on what a run with these settings will not measure, before it starts.

    Names of held-out texts are known then; what other kinds are measured on is not, so only the kind is looked at.
    """
    texts = config.data.heldout
    names = [PARAMS, FORWARD_SPEED, *(f"{kind}/{text}" for kind in OF_HELDOUT_TEXTS for text in texts)]
    kinds = [f"{kind}/*" for kind in OTHER_KINDS]
    problems = []
    for name, limit in limits.items():
        is_other = any(fnmatchcase(kind, limit.metric.partition("/")[0]) for kind in OTHER_KINDS)
        if not is_other and not any(_matches(known, _whole(limit.metric)) for known in names):
            problems.append(_unmatched(name, limit, [*names, *kinds], "what a run measures"))
    return problems


def plan_lines(limits: Mapping[str, LimitConfig]) -> list[str]:
    """Return a line a limit, as nothing is measured yet."""
    verdicts = [_verdict(name, limit.metric, limit, None) for name, limit in limits.items()]
    return [f"gate: {each.limit}: {each.row()['of']} must be {each.must_be}" for each in verdicts]


def verdicts_of(limits: Mapping[str, LimitConfig], run: Path) -> list[Verdict]:
    """Return the verdicts of a run.

    Raises:
        ConfigError: nothing is evaluated there, or `judge` refuses a limit.
    """
    found = measured(run)
    if not found:
        raise ConfigError(f"run.dir={run} has nothing evaluated, which the gate needs; run recipes.evaluate first.")
    return judge(limits, found, run)


def passes(limits: Mapping[str, LimitConfig], run: Path) -> bool:
    """Whether a run keeps every limit."""
    return all(verdict.passed for verdict in verdicts_of(limits, run))


def hold(limits: Mapping[str, LimitConfig], run: Path, console: Console) -> None:
    """Print the verdicts of a run.

    Raises:
        GateFailed: a limit does not hold.
    """
    verdicts = verdicts_of(limits, run)
    print_table(console, "Gate", [verdict.row() for verdict in verdicts])
    if failed := [verdict for verdict in verdicts if not verdict.passed]:
        reasons = "; ".join(
            f"{each.limit}: {row['of']} is {row['measured'] or 'not there'} and must be {each.must_be}"
            for each in failed
            for row in [each.row()]
        )
        raise GateFailed(f"FAIL, {len(failed)} of {len(verdicts)} limits do not hold for {run}: {reasons}.")
    console.print(f"gate: PASS, {len(verdicts)} of {len(verdicts)} limits hold", markup=False, highlight=False)


def as_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return verdicts as JSON takes them."""
    return {"passed": all(verdict.passed for verdict in verdicts), "limits": [asdict(verdict) for verdict in verdicts]}


def gate(config: GateRunConfig, console: Console) -> None:
    """Judge a finished run; a dry run prints the limits alone."""
    limits, run = config.gate.limits, Path(config.run.dir)
    if config.dry_run:
        console.print("\n".join(plan_lines(limits)), soft_wrap=True, markup=False, highlight=False)
        return
    hold(limits, run, console)
