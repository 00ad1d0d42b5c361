"""Names of a model's units: one scheme for their scores, second moments and eliminations; layers 0-based and global."""

from __future__ import annotations

import re

from compactlm_nemo.errors import DataError

HIDDEN = "hidden"
"""Channels of the residual stream."""
DEPTH = "depth"
"""Layers."""
FINAL_NORM = "final_norm"
REAP = "reap"
"""Prefix of the scores of experts over the tokens that were sent to them."""


def heads_key(layer_idx: int) -> str:
    """Name of a layer's query heads, whose outputs the output projection reads."""
    return f"layers.{layer_idx}.heads"


def groups_key(layer_idx: int) -> str:
    """Name of a layer's query groups."""
    return f"layers.{layer_idx}.groups"


def mlp_key(layer_idx: int) -> str:
    """Name of the neurons of a dense layer, which fc2 reads."""
    return f"layers.{layer_idx}.mlp"


def experts_key(layer_idx: int) -> str:
    """Name of a layer's experts."""
    return f"layers.{layer_idx}.experts"


def expert_mlp_key(layer_idx: int, expert: int) -> str:
    """Name of the neurons of one routed expert."""
    return f"layers.{layer_idx}.experts.{expert}.mlp"


def shared_expert_key(layer_idx: int) -> str:
    """Name of the neurons of the expert that sees every token."""
    return f"layers.{layer_idx}.shared_expert.mlp"


def attention_norm_key(layer_idx: int) -> str:
    """Name of the channels behind the norm before a layer's attention."""
    return f"layers.{layer_idx}.attention_norm"


def mlp_norm_key(layer_idx: int) -> str:
    """Name of the channels behind the norm before a layer's MLP."""
    return f"layers.{layer_idx}.mlp_norm"


NAME_PATTERNS = {
    HIDDEN: HIDDEN,
    "heads": r"layers\.\d+\.heads",
    "groups": r"layers\.\d+\.groups",
    "mlp": r"layers\.\d+\.mlp",
    "experts": r"layers\.\d+\.experts",
    "expert_mlp": r"layers\.\d+\.experts\.\d+\.mlp",
    "shared_expert": r"layers\.\d+\.shared_expert\.mlp",
    DEPTH: DEPTH,
}
"""Axis of scores -> what the names of its vectors look like."""


def axis_of(name: str) -> str:
    """Return the axis that a score vector's name, without the prefix of a metric, belongs to."""
    for axis, pattern in NAME_PATTERNS.items():
        if re.fullmatch(pattern, name):
            return axis
    raise DataError(f"{name} is not the name of a score vector; give those of one metric, without its prefix.")
