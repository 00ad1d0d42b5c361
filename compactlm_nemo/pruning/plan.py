"""Which layers, channels, neurons and heads of the teacher become the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.importance.scores import DEPTH, HIDDEN, heads_key, mlp_key
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.select import check_scores, keep_layers, top_heads, top_units


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Kept indices, all 0-based, ascending and in the teacher's numbering; int64 tensors on the CPU."""

    layers: list[int]
    """Kept layers; the student's layer j is the teacher's ``layers[j]``."""
    hidden: Tensor
    """Kept channels of the residual stream, the same in every layer."""
    mlp: dict[int, Tensor]
    """Teacher layer -> kept neurons, for the kept layers."""
    heads: dict[int, Tensor]
    """Teacher layer -> kept query heads, equally many of each query group, for the kept layers."""

    def to_json(self) -> dict[str, Any]:
        """Lists and string keys only."""
        return {
            "layers": list(self.layers),
            "hidden": self.hidden.tolist(),
            "mlp": {str(i): kept.tolist() for i, kept in self.mlp.items()},
            "heads": {str(i): kept.tolist() for i, kept in self.heads.items()},
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote; CheckpointError when it is not one."""
        try:
            return Plan(
                layers=[int(i) for i in values["layers"]],
                hidden=torch.tensor(values["hidden"], dtype=torch.int64),
                mlp={int(i): torch.tensor(kept, dtype=torch.int64) for i, kept in values["mlp"].items()},
                heads={int(i): torch.tensor(kept, dtype=torch.int64) for i, kept in values["heads"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"pruning plan: {error!r} while reading it; run the prune stage again.") from None


def make_plan(teacher: Dims, student: Dims, scores: dict[str, Tensor]) -> Plan:
    """Keep the units with the highest scores; of equal scores the lower index stays.

    Args:
        teacher: The model that was scored.
        student: Its sizes cut; everything else must be the teacher's.
        scores: `hidden` [H], `layers.{i}.mlp` [F], `layers.{i}.heads` [heads], `depth` [layers]; whole vectors.
    Returns:
        The plan; heads are chosen inside each query group, so that every group keeps the same number.
    Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2.3.
    """
    _check_student(teacher, student)
    check_scores(teacher, scores)
    layers: list[int] = keep_layers(scores[DEPTH], student.num_layers).tolist()
    return Plan(
        layers=layers,
        hidden=top_units(scores[HIDDEN], student.hidden_size),
        mlp={i: top_units(scores[mlp_key(i)], student.ffn_hidden_size) for i in layers},
        heads={i: top_heads(scores[heads_key(i)], student.num_heads, teacher.num_query_groups) for i in layers},
    )


def _check_student(teacher: Dims, student: Dims) -> None:
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads"):
        value, largest = getattr(student, name), getattr(teacher, name)
        if not 1 <= value <= largest:
            raise ConfigError(f"student {name}={value} must be in [1, {largest}] (the teacher's); pick a smaller one.")
    if student.num_heads % teacher.num_query_groups:
        raise ConfigError(
            f"student num_heads={student.num_heads} must be a multiple of the teacher's "
            f"{teacher.num_query_groups} query groups; change search.heads."
        )
    cut = teacher.with_shape(
        layers=student.num_layers, hidden=student.hidden_size, ffn=student.ffn_hidden_size, heads=student.num_heads
    )
    changed = [name for name, value in vars(cut).items() if getattr(student, name) != value]
    if changed:
        raise ConfigError(f"student {', '.join(changed)} must be the teacher's: pruning cuts sizes only; restore them.")
