"""The axes along which a model can be cut: the one table that spaces, candidates, budgets, rounds and checks read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of a cut."""

    size: str
    """Field of `models.dims.Dims` that the axis changes."""
    words: str
    """What messages call the size."""
    split_by_tp: bool = False
    """Whether tensor parallelism splits the axis: `parallel.tp` must then divide its size."""


AXES = {
    "layers": Axis("num_layers", "layers"),
    "hidden": Axis("hidden_size", "hidden size"),
    "ffn": Axis("ffn_hidden_size", "MLP width", split_by_tp=True),
    "heads": Axis("num_heads", "heads", split_by_tp=True),
    "groups": Axis("num_query_groups", "query groups", split_by_tp=True),
    "experts": Axis("num_experts", "experts"),
    "shared_expert_ffn": Axis("shared_expert_ffn", "shared expert's width", split_by_tp=True),
}
"""Setting of `search` -> its axis. The name is also the argument of `Dims.with_shape` and a field of a `Candidate`; a
search sorts its space by the axes in this order."""
