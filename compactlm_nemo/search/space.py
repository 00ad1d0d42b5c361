"""The architectures of a search space that fit the budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from compactlm_nemo.config.schema import SearchConfig
from compactlm_nemo.errors import ConfigError, listed
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import (
    active_params,
    embedding_params,
    flops_per_token_forward,
    memory_bytes,
    num_params,
)

AXES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_heads",
    "groups": "num_query_groups",
    "experts": "num_experts",
    "shared_expert_ffn": "shared_expert_ffn",
}
"""Setting of `search` and argument of `Dims.with_shape` -> the size of an architecture."""
SPLIT_BY_TP = ("ffn", "heads", "groups", "shared_expert_ffn")
"""Axes that tensor parallelism splits: values by rule are multiples of `parallel.tp`."""


@dataclass(frozen=True)
class Budget:
    """One constraint on a candidate."""

    name: str
    target: float
    cost: Callable[[Dims], float]
    band: float | None
    """Accepted relative distance; None: the target is an upper limit."""

    def excess(self, dims: Dims) -> float:
        """Relative distance beyond what is accepted; 0 when met."""
        away = self.cost(dims) / self.target - 1
        return max(0.0, away) if self.band is None else max(0.0, abs(away) - self.band)

    def __str__(self) -> str:
        return f"search.{self.name}={self.target:.6g}" + (f" within search.band={self.band:g}" if self.band else "")


def budgets(cfg: SearchConfig) -> list[Budget]:
    """The constraints that are set and can be counted; latency has to be measured."""
    costs: dict[str, Callable[[Dims], float]] = {
        "params": num_params,
        "non_embedding_params": lambda dims: num_params(dims) - embedding_params(dims),
        "active_params": active_params,
        "memory_bytes": lambda dims: memory_bytes(dims, cfg.batch * cfg.context, cfg.bytes_per_value),
        "flops": lambda dims: flops_per_token_forward(dims, cfg.context),
    }
    limits = ("memory_bytes", "flops")
    return [
        Budget(name, getattr(cfg, name), cost, None if name in limits else cfg.band)
        for name, cost in costs.items()
        if getattr(cfg, name) is not None
    ]


def enumerate_space(teacher: Dims, cfg: SearchConfig, tp: int = 1) -> list[Dims]:
    """Every combination of the axes that meets all budgets.

    An empty axis keeps the teacher's value; values by rule (`search.multiples`, `search.divisors`) are those that `tp`
    ranks can split. Order: more layers first, then larger hidden size, MLP width, heads, groups and experts; no
    architecture appears twice.
    """
    values = {axis: _values(axis, teacher, cfg, tp) for axis in AXES}
    _check_axes(teacher, cfg, values)
    shapes = {
        (layers, hidden, ffn, heads, *rest)
        for layers, hidden, heads, *rest in product(*(values[axis] for axis in AXES if axis != "ffn"))
        for ffn in ([round(m * hidden) for m in cfg.ffn_multiples] or values["ffn"])
        if _heads_fit(teacher, heads, rest[0])
    }
    space = [teacher.with_shape(**dict(zip(AXES, shape, strict=True))) for shape in sorted(shapes, reverse=True)]
    limits = budgets(cfg)
    feasible = [dims for dims in space if not any(limit.excess(dims) for limit in limits)]
    if not feasible:
        raise ConfigError(_nearest(space, limits))
    return feasible


def _heads_fit(teacher: Dims, heads: int, groups: int) -> bool:
    """Whether so many heads can be so many groups of the teacher with equally many each."""
    return heads % groups == 0 and heads // groups <= teacher.num_heads // teacher.num_query_groups


def _values(axis: str, teacher: Dims, cfg: SearchConfig, tp: int) -> list[int]:
    """The values of an axis: given, by rule between `search.smallest` and the teacher's, or the teacher's."""
    size = getattr(teacher, AXES[axis])
    given: list[int] = getattr(cfg, axis)
    if axis not in cfg.multiples and axis not in cfg.divisors:
        return given or [size]
    step = cfg.multiples.get(axis, 1)
    unit = step * tp // _gcd(step, tp) if axis in SPLIT_BY_TP else step
    found = [value for value in range(unit, size + 1, unit) if value >= cfg.smallest * size]
    if axis in cfg.divisors:
        found = [value for value in found if size % value == 0]
    if not found:
        raise ConfigError(
            f"search.{'divisors' if axis in cfg.divisors else 'multiples'} of {axis} has no value between "
            f"search.smallest={cfg.smallest:g} and 1 times {size} that parallel.tp={tp} divides; lower search.smallest."
        )
    return found


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def _nearest(space: list[Dims], limits: list[Budget]) -> str:
    """What is wrong with the budgets, and the candidate that misses them by least."""
    asked = " and ".join(map(str, limits))
    if not space:
        return "search.heads and search.groups have no combination that the teacher's groups allow; change either."
    best = min(space, key=lambda dims: sum(limit.excess(dims) for limit in limits))
    has = ", ".join(f"{limit.cost(best):.10g} {limit.name.replace('params', 'parameters')}" for limit in limits)
    return f"{asked} is met by none of {len(space)} architectures; the nearest has {has}: aim there or widen the axes."


def _check_axes(teacher: Dims, cfg: SearchConfig, values: dict[str, list[int]]) -> None:
    """One ConfigError that lists every value the teacher cannot be cut to."""
    problems = [problem for axis in AXES for problem in _out_of_range(axis, values[axis], getattr(teacher, AXES[axis]))]
    groups = values["groups"]
    per_group = teacher.num_heads // teacher.num_query_groups
    problems += [
        f"search.heads={heads} must be a multiple of {' or '.join(map(str, groups))} query groups with at most "
        f"{per_group} heads each; try {_nearest_heads(heads, groups[-1], per_group)}."
        for heads in cfg.heads
        if not any(_heads_fit(teacher, heads, group) for group in groups)
    ]
    if teacher.num_experts:
        problems += [
            f"search.experts={count} must be at least the {teacher.experts_per_token} a token is sent to; raise it."
            for count in values["experts"]
            if 0 < count < teacher.experts_per_token
        ]
    for multiple, hidden in product(cfg.ffn_multiples, values["hidden"]):
        width = multiple * hidden
        name = f"search.ffn_multiples={multiple:g} times hidden {hidden}"
        # A multiple such as 1.1 is not exact in binary, so "whole" allows for its rounding.
        if abs(width - round(width)) > 1e-6:
            problems.append(f"{name} is {width:g}, must be whole; change either of them.")
        elif not 1 <= round(width) <= teacher.ffn_hidden_size:
            problems.append(f"{name} is {round(width)}, must be in [1, {teacher.ffn_hidden_size}] (the teacher's).")
    if problems:
        raise ConfigError(listed(problems))


def _nearest_heads(heads: int, groups: int, per_group: int) -> int:
    return groups * min(per_group, max(1, heads // groups))


def _out_of_range(axis: str, values: Sequence[int], largest: int) -> list[str]:
    return [
        f"search.{axis}={value} must be in [{min(1, largest)}, {largest}] (the teacher's value); remove it."
        for value in values
        if not min(1, largest) <= value <= largest
    ]
