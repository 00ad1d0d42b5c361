"""A plan says which layers, channels, heads, neurons and experts of the teacher become the student."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.importance.names import (
    DEPTH,
    HIDDEN,
    expert_mlp_key,
    experts_key,
    heads_key,
    mlp_key,
    shared_expert_key,
)
from compactlm_nemo.importance.selection import check_scores, keep_heads, keep_layers, top_units
from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.limits import cut_problem

PLAN = "plan.json"
"""Name of the plan's file in a student's folder."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan holds kept indices, all 0-based, ascending and in the teacher's numbering; int64 tensors on the CPU."""

    layers: list[int]
    """Kept layers; the student's layer j is the teacher's ``layers[j]``."""
    hidden: Tensor
    """Kept channels of the residual stream, for all layers."""
    heads: dict[int, Tensor]
    """Teacher layer -> kept query heads, equally many of each kept query group, for the kept layers."""
    mlp: dict[int, Tensor] = field(default_factory=dict)
    """Teacher layer -> kept neurons; empty where layers have experts."""
    experts: dict[int, Tensor] = field(default_factory=dict)
    """Teacher layer -> kept experts."""
    expert_mlp: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """Teacher layer -> kept expert in the teacher's numbering -> kept neurons of the expert, equally many of each."""
    shared_expert: dict[int, Tensor] = field(default_factory=dict)
    """Teacher layer -> kept neurons of the expert that sees every token."""
    merge: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Teacher layer -> pairs (kept head, removed head that is merged into it), each within one group."""

    def student(self, teacher: Dims, sizes: Dims) -> Dims:
        """Return the architecture of these sizes whose layers are the kept ones of the teacher."""
        return teacher.keep_layers(self.layers).with_shape(**sizes.shape())

    def to_json(self) -> dict[str, Any]:
        """Write the plan as lists and dictionaries with string keys."""
        values: dict[str, Any] = _plain(vars(self))
        return values

    @staticmethod
    def from_json(values: dict[str, Any]) -> Plan:
        """Read the plan that `to_json` wrote; CheckpointError when the values are no plan."""
        try:
            return Plan(
                layers=[int(i) for i in values["layers"]],
                hidden=_indices(values["hidden"]),
                expert_mlp={int(i): _by_number(experts) for i, experts in values["expert_mlp"].items()},
                merge={int(i): [(int(a), int(b)) for a, b in pairs] for i, pairs in values["merge"].items()},
                **{name: _by_number(values[name]) for name in ("heads", "mlp", "experts", "shared_expert")},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"pruning plan: {error!r} while reading it; run the prune stage again.") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def _indices(indices: list[int]) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64)


def _by_number(values: dict[str, list[int]]) -> dict[int, Tensor]:
    return {int(number): _indices(indices) for number, indices in values.items()}


def make_plan(teacher: Dims, student: Dims, scores: dict[str, Tensor], *, merge_heads: bool = False) -> Plan:
    """Keep the units with the highest scores; of equal scores the lower index stays.

    Args:
        teacher: The model that was scored.
        student: Its sizes cut; everything else must be the teacher's.
        scores: Whole vectors under `importance.names`, without a metric's prefix. `layers.{i}.groups` is needed
            when query groups are cut. `depth` holds one number a layer, or one a block.
        merge_heads: Fold removed query heads into kept ones of their group.
    Returns:
        The plan. Whole query groups are chosen first, then heads inside each kept group, so that every group keeps
        equally many; experts are chosen first, then the neurons of each.
    Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2.3.
    """
    _check_student(teacher, student)
    check_scores(teacher, scores)
    layers: list[int] = keep_layers(scores[DEPTH], student.num_layers).tolist()
    heads = {i: keep_heads(i, teacher, student, scores) for i in layers}
    plan = Plan(layers=layers, hidden=top_units(scores[HIDDEN], student.hidden_size), heads=heads)
    if merge_heads:
        merge = {i: _merged(scores[heads_key(i)], heads[i], teacher, student) for i in layers}
        plan = replace(plan, merge={i: pairs for i, pairs in merge.items() if pairs})
    if not teacher.num_experts:
        return replace(plan, mlp={i: top_units(scores[mlp_key(i)], student.ffn_hidden_size) for i in layers})
    experts = {i: top_units(scores[experts_key(i)], student.num_experts) for i in layers}
    neurons = {
        i: {e: top_units(scores[expert_mlp_key(i, e)], student.ffn_hidden_size) for e in experts[i].tolist()}
        for i in layers
    }
    shared = layers if teacher.shared_expert_ffn else []
    return replace(
        plan,
        experts=experts,
        expert_mlp=neurons,
        shared_expert={i: top_units(scores[shared_expert_key(i)], student.shared_expert_ffn) for i in shared},
    )


def _merged(score_E: Tensor, kept_heads: Tensor, teacher: Dims, student: Dims) -> list[tuple[int, int]]:
    """Pair heads (i, 2K - i + 1) of a group's L heads, best first and counted from 1, for i from 2K - L + 1 to K.

    Source: arXiv:2407.14679, section 2.3.
    """
    per_group, num_kept = teacher.num_heads // teacher.num_query_groups, student.num_heads // student.num_query_groups
    if 2 * num_kept < per_group:
        raise ConfigError(
            f"prune.heads=merge keeps {num_kept} of {per_group} heads of a query group and needs at least half of "
            "them; keep more in search.heads, or set prune.heads=cut."
        )
    pairs = []
    for group in sorted({head // per_group for head in kept_heads.tolist()}):
        heads = range(group * per_group, (group + 1) * per_group)
        best_first = sorted(heads, key=lambda head: (head not in kept_heads, -float(score_E[head]), head))
        first = 2 * num_kept - per_group + 1
        pairs += [(best_first[i - 1], best_first[2 * num_kept - i]) for i in range(first, num_kept + 1)]
    return pairs


def _check_student(teacher: Dims, student: Dims) -> None:
    """Raise ConfigError unless the student is the teacher with smaller sizes that fit together."""
    for axis, value in student.shape().items():
        name, largest = AXES[axis].size, teacher.shape()[axis]
        if not min(1, largest) <= value <= largest:
            raise ConfigError(f"student {name}={value} must be in [1, {largest}] (the teacher's); pick a smaller one.")
    per_group = teacher.num_heads // teacher.num_query_groups
    if student.num_heads % student.num_query_groups:
        raise ConfigError(
            f"student num_heads={student.num_heads} must be a multiple of its {student.num_query_groups} query groups; "
            "change search.heads."
        )
    if student.num_heads // student.num_query_groups > per_group:
        raise ConfigError(
            f"student num_heads={student.num_heads} in {student.num_query_groups} query groups are more than the "
            f"teacher's {per_group} heads a group; lower search.heads or keep more search.groups."
        )
    if student.num_experts < teacher.experts_per_token:
        raise ConfigError(
            f"student num_experts={student.num_experts} must be at least the {teacher.experts_per_token} that a token "
            "is sent to; raise search.experts."
        )
    if problem := cut_problem(teacher, student):
        raise ConfigError(problem)
    cut = teacher.with_shape(**student.shape())
    changed = [name for name, value in vars(cut).items() if getattr(student, name) != value]
    if changed:
        raise ConfigError(f"student {', '.join(changed)} must be the teacher's: pruning cuts sizes only; restore them.")
