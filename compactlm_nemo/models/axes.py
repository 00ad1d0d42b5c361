"""The axes along which a model can be cut."""

from __future__ import annotations

SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_heads": "heads",
    "num_query_groups": "groups",
    "num_experts": "experts",
    "shared_expert_ffn": "shared_expert_ffn",
}
"""Sizes that a cut may change -> the setting of `search` and the argument of `Dims.with_shape`."""


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
