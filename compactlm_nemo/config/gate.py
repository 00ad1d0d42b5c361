"""Settings of the gate: limits that a student must keep to be worth shipping, in files of conf/gate/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.config.run import RunFolder
from compactlm_nemo.errors import require


class GatedModel(Enum):
    """Whose number a limit is of."""

    pruned = "pruned"
    distilled = "distilled"


class Compared(Enum):
    """What of a number a limit is held against: itself, how far it lies above the teacher's, or its share of that."""

    value = "value"
    against_teacher = "against_teacher"
    ratio = "ratio"


@dataclass(kw_only=True)
class LimitConfig:
    """One limit, on every metric that its name or pattern matches."""

    metric: str
    """Name of a metric, `loss/wiki`, or a pattern as of file names, `loss/*`, which must match one at least."""
    model: GatedModel = GatedModel.distilled
    compare: Compared = Compared.value
    at_most: float | None = None
    at_least: float | None = None
    confident: bool = False
    """Whether the far end of the 95 % interval must keep the limit too, and not the measured number alone."""


def limit_of(key: str, value: Any) -> LimitConfig:
    """Return a limit from a mapping of its settings; OmegaConf cannot type values that users add."""
    if isinstance(value, LimitConfig):
        return value
    given: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {}
    names = [each.name for each in fields(LimitConfig)]
    is_text = isinstance(given.get("metric"), str) and given["metric"].strip() != ""
    bounds = {name: given[name] for name in ("at_most", "at_least") if given.get(name) is not None}
    require(
        is_text and bool(bounds) and given.keys() <= set(names),
        f"{key}={value} must name a metric and at_most or at_least, and may have of {', '.join(names)} no others; for "
        f"example {key}={{metric: loss/*, compare: against_teacher, at_most: 0.3}}.",
    )
    for name, bound in bounds.items():
        require(
            isinstance(bound, (int, float)) and not isinstance(bound, bool), f"{key}.{name}={bound} must be a number."
        )
    for name, choices in (("model", GatedModel), ("compare", Compared)):
        known, chosen = choices.__members__, given.get(name)
        if name in given and not isinstance(chosen, choices):
            require(isinstance(chosen, str) and chosen in known, f"{key}.{name}={chosen} must be {' or '.join(known)}.")
            given[name] = known[str(chosen)]
    limit = LimitConfig(**given)
    require(isinstance(limit.confident, bool), f"{key}.confident={limit.confident} must be true or false.")
    require(
        limit.compare is not Compared.ratio or not limit.confident,
        f"{key}.confident=true needs an interval, which a ratio has not; use compare=against_teacher, or leave it out.",
    )
    low, high = limit.at_least, limit.at_most
    require(
        low is None or high is None or low <= high,
        f"{key}.at_least={low} must be <= {key}.at_most={high}; correct one.",
    )
    return limit


@dataclass(kw_only=True)
class GateConfig:
    limits: dict[str, Any] = setting({})
    """Limits by name, as `gate.limits.loss={metric: loss/*, compare: against_teacher, at_most: 0.3}`; gate=NAME takes
    those of conf/gate/NAME.yaml. Each has a `metric`, of the `model` distilled or pruned, of which `compare` takes the
    `value`, how far it is `against_teacher` (student - teacher), or the `ratio` to the teacher's; it must be `at_most`
    or `at_least` a number, with `confident: true` at the far end of its interval too. A run in which one does not hold
    ends with exit code 3, and pushes nothing."""

    def __post_init__(self) -> None:
        self.limits = {name: limit_of(f"gate.limits.{name}", value) for name, value in self.limits.items()}


@dataclass(kw_only=True)
class GateRunConfig:
    """Settings of `recipes.gate`, which reads a finished run and changes nothing."""

    run: RunFolder = field(default_factory=RunFolder)
    gate: GateConfig = field(default_factory=GateConfig)
    dry_run: bool = False
    """Print the limits, and exit 0."""

    def __post_init__(self) -> None:
        require(bool(self.gate.limits), "gate.limits is empty; name a file of conf/gate/, for example gate=default.")
