"""What a plan in run.dir says of the memory of a training, to be logged beside what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compactlm_nemo.config.schema import Config

PLAN_FILE = "plan.json"
"""What `recipes.plan` writes into run.dir."""


def planned_bytes(config: Config, stage: str, ranks: int) -> int | None:
    """Return the peak that `recipes.plan` has found for this training; None where it planned none of this layout."""
    path = Path(config.run.dir) / PLAN_FILE
    try:
        plan = json.loads(path.read_text())
        if (plan["ranks"], plan["layout"]) != (ranks, planned_layout(config)):
            return None
        (found,) = [int(row["peak_bytes"]) for row in plan["stages"] if row["stage"] == stage]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def planned_layout(config: Config) -> dict[str, Any]:
    """Return what of the settings a plan's memory depends on most, as plain values."""
    cfg = config.distill
    own = {"micro_batch": cfg.micro_batch, "global_batch": cfg.global_batch, "recompute": cfg.recompute.name}
    return vars(config.parallel) | own | {"sequence_length": config.data.sequence_length}
