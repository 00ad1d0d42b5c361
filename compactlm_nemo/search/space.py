"""A search space is every combination of the axes' values; budgets choose the architectures that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.errors import ConfigError, listed
from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import counts


@dataclass(frozen=True)
class Budget:
    """A budget is one constraint on a candidate."""

    name: str
    target: float
    cost: Callable[[Dims], float]
    band: float | None = None
    """Accepted relative distance; None: the target is an upper limit."""

    def excess(self, dims: Dims) -> float:
        """Return the relative distance beyond what is accepted; 0 when the budget is met."""
        away = self.cost(dims) / self.target - 1
        return max(0.0, away) if self.band is None else max(0.0, abs(away) - self.band)

    def __str__(self) -> str:
        within = "" if self.band is None else f" within search.band={self.band:g}"
        return f"search.{self.name}={self.target:.6g}{within}"


LIMITS = ("memory_bytes", "flops")
"""Budgets that are upper limits; all others are targets with a band."""


def budgets(cfg: SearchConfig) -> list[Budget]:
    """List the budgets that are set and can be counted; latency has to be measured."""
    return [
        Budget(name, getattr(cfg, name), count, None if name in LIMITS else cfg.band)
        for name, count in counts(cfg).items()
        if getattr(cfg, name) is not None
    ]


def within(space: list[Dims], limits: list[Budget]) -> list[Dims]:
    """Choose the architectures that meet all budgets, in order; ConfigError when there is none."""
    feasible = [dims for dims in space if not any(limit.excess(dims) for limit in limits)]
    if not feasible:
        raise ConfigError(_nearest(space, limits))
    return feasible


def enumerate_space(
    teacher: Dims, cfg: SearchConfig, tp: int = 1, layers_of: Callable[[int], list[int]] | None = None
) -> list[Dims]:
    """List every combination of the axes that meets all budgets.

    An empty axis keeps the teacher's value; there are as many groups as heads where the teacher has so. Values by rule
    (`search.multiples`, `search.divisors`) are those that `tp` ranks can split. Order: more layers first, then larger
    hidden size, MLP width, heads, groups and experts; no architecture appears twice.

    Args:
        layers_of: Number of layers -> those that stay, where scores tell; else they count as the first ones.
    """
    values = {axis: _values(axis, teacher, cfg, tp) for axis in AXES}
    _check_axes(teacher, cfg, values)
    shapes = {
        tuple(shape.values()) for shape in _shapes(values, cfg) if _heads_fit(teacher, shape["heads"], shape["groups"])
    }
    space = []
    for sizes in sorted(shapes, reverse=True):
        shape = dict(zip(AXES, sizes, strict=True))
        kept = teacher if layers_of is None else teacher.keep_layers(layers_of(shape["layers"]))
        space.append(kept.with_shape(**shape))
    if not space:
        most = max(values["groups"]) * (teacher.num_heads // teacher.num_query_groups)
        raise ConfigError(
            f"search.groups={values['groups']} fits none of {values['heads']} heads; set search.heads to multiples of "
            f"the groups, {most} at most."
        )
    return within(space, budgets(cfg))


def _shapes(values: dict[str, list[int]], cfg: SearchConfig) -> Iterator[dict[str, int]]:
    """Yield every combination of the axes' values; `search.ffn_multiples` give the MLP widths of each hidden size."""
    for sizes in product(*values.values()):
        shape = dict(zip(values, sizes, strict=True))
        widths = [round(multiple * shape["hidden"]) for multiple in cfg.ffn_multiples] or [shape["ffn"]]
        yield from (shape | {"ffn": ffn} for ffn in widths)


def _heads_fit(teacher: Dims, heads: int, groups: int) -> bool:
    """Whether `heads` can be divided equally among `groups`, with at most the teacher's heads in each group."""
    return heads % groups == 0 and heads // groups <= teacher.num_heads // teacher.num_query_groups


def _values(axis: str, teacher: Dims, cfg: SearchConfig, tp: int) -> list[int]:
    """Return the values of an axis: those given, those by rule from `search.smallest` on, or the teacher's."""
    size = getattr(teacher, AXES[axis].size)
    if axis == "groups" and not cfg.groups and not {"groups"} & {*cfg.multiples, *cfg.divisors}:
        if teacher.num_heads == teacher.num_query_groups:  # a head that goes takes its keys and values along
            return _values("heads", teacher, cfg, tp)
    given: list[int] = getattr(cfg, axis)
    if axis not in cfg.multiples and axis not in cfg.divisors:
        return given or [size]
    step = cfg.multiples.get(axis, 1)
    unit = math.lcm(step, tp) if AXES[axis].split_by_tp else step
    least = max(cfg.smallest * size, teacher.experts_per_token if axis == "experts" else 0)
    values = [value for value in range(unit, size + 1, unit) if value >= least]
    if axis in cfg.divisors:
        values = [value for value in values if size % value == 0]
    if not values:
        raise ConfigError(
            f"search.{'divisors' if axis in cfg.divisors else 'multiples'} of {axis} has no value between "
            f"search.smallest={cfg.smallest:g} and 1 times {size} that parallel.tp={tp} divides; lower search.smallest."
        )
    return values


def shape_of(dims: Dims) -> str:
    """Write the sizes that a search chooses in words."""
    return (
        f"{dims.num_layers} layers, hidden {dims.hidden_size}, heads {dims.num_heads}/{dims.num_query_groups}, "
        f"MLP {dims.ffn_hidden_size}"
        + f" x {dims.num_experts} experts" * (dims.num_experts > 0)
        + f" and {dims.shared_expert_ffn} shared" * (dims.shared_expert_ffn > 0)
    )


def _nearest(space: list[Dims], limits: list[Budget]) -> str:
    """Say which budgets no architecture meets, or that all together are too much, and what comes closest."""
    impossible = [limit for limit in limits if all(limit.excess(dims) for dims in space)]
    named = " and ".join(map(str, impossible or limits))
    met = f"is met by none of {len(space)} architectures" if impossible else f"is more than any of {len(space)} meets"
    best = min(space, key=lambda dims: sum(limit.excess(dims) for limit in limits))
    has = ", ".join(f"{limit.cost(best):.10g} {limit.name.replace('params', 'parameters')}" for limit in limits)
    return f"{named} {met}; the nearest has {has} ({shape_of(best)}): aim there or widen the axes."


def _check_axes(teacher: Dims, cfg: SearchConfig, values: dict[str, list[int]]) -> None:
    """Raise one ConfigError that lists every value the teacher cannot be cut to."""
    problems = [
        problem for axis, largest in teacher.shape().items() for problem in _out_of_range(axis, values[axis], largest)
    ]
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
