"""The architectures of a search space that fit the parameter budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from compactlm_nemo.config.schema import SearchConfig
from compactlm_nemo.errors import ConfigError, listed
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import num_params


def enumerate_space(teacher: Dims, cfg: SearchConfig) -> list[Dims]:
    """Every combination of the axes with ``|params / search.params - 1| <= search.band``.

    An empty axis keeps the teacher's value. Without `search.params` every combination is returned. Order: more
    layers first, then larger hidden size, MLP width and number of heads; no architecture appears twice.
    """
    _check_axes(teacher, cfg)
    shapes = {
        (layers, hidden, ffn, heads)
        for layers, hidden, heads in product(
            cfg.layers or [teacher.num_layers], cfg.hidden or [teacher.hidden_size], cfg.heads or [teacher.num_heads]
        )
        for ffn in _ffn_widths(teacher, cfg, hidden)
    }
    space = [
        teacher.with_shape(layers=layers, hidden=hidden, ffn=ffn, heads=heads)
        for layers, hidden, ffn, heads in sorted(shapes, reverse=True)
    ]
    if cfg.params is None:
        return space
    target = cfg.params
    feasible = [dims for dims in space if abs(num_params(dims) / target - 1) <= cfg.band]
    if not feasible:
        nearest = min((num_params(dims) for dims in space), key=lambda n: abs(n - target))
        raise ConfigError(
            f"search.params={target:.6g} is met by none of {len(space)} architectures within "
            f"search.band={cfg.band:g}; the nearest has {nearest} parameters: aim there or widen the axes."
        )
    return feasible


def _ffn_widths(teacher: Dims, cfg: SearchConfig, hidden: int) -> list[int]:
    if cfg.ffn_multiples:
        return [round(multiple * hidden) for multiple in cfg.ffn_multiples]
    return cfg.ffn or [teacher.ffn_hidden_size]


def _check_axes(teacher: Dims, cfg: SearchConfig) -> None:
    """One ConfigError that lists every value the teacher cannot be cut to."""
    problems = [
        *_out_of_range("layers", cfg.layers, teacher.num_layers),
        *_out_of_range("hidden", cfg.hidden, teacher.hidden_size),
        *_out_of_range("ffn", cfg.ffn, teacher.ffn_hidden_size),
        *_out_of_range("heads", cfg.heads, teacher.num_heads),
    ]
    groups = teacher.num_query_groups
    problems += [
        f"search.heads={heads} must be a multiple of the teacher's {groups} query groups; "
        f"try {max(groups, heads // groups * groups)}."
        for heads in cfg.heads
        if heads % groups
    ]
    for multiple, hidden in product(cfg.ffn_multiples, cfg.hidden or [teacher.hidden_size]):
        width = multiple * hidden
        name = f"search.ffn_multiples={multiple:g} times hidden {hidden}"
        # A multiple such as 1.1 is not exact in binary, so "whole" allows for its rounding.
        if abs(width - round(width)) > 1e-6:
            problems.append(f"{name} is {width:g}, must be whole; change either of them.")
        elif not 1 <= round(width) <= teacher.ffn_hidden_size:
            problems.append(f"{name} is {round(width)}, must be in [1, {teacher.ffn_hidden_size}] (the teacher's).")
    if cfg.params is not None and cfg.params <= 0:
        problems.append(f"search.params={cfg.params:g} must be > 0; null takes the whole space.")
    if problems:
        raise ConfigError(listed(problems))


def _out_of_range(axis: str, values: Sequence[int], largest: int) -> list[str]:
    return [
        f"search.{axis}={value} must be in [1, {largest}] (the teacher's value); remove it."
        for value in values
        if not 1 <= value <= largest
    ]
