"""Backward elimination removes the units of a layer one by one, by the error that refitting leaves.

One elimination per layer and axis gives the order of removal and the error at every size. Layers are shared out over
all ranks; `elimination.safetensors` belongs to the model::

    layers.{i}.mlp.order      [F]          int64, neurons in order of removal
    layers.{i}.mlp.error      [F + 1]      float64, share of fc2's output that is lost without the first n of the order
    layers.{i}.heads.order    [heads]      query heads, one of every group in turn
    layers.{i}.heads.error    [heads + 1]
    hidden.error              [H + 1]      share of the normed stream that is lost without n channels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compactlm_nemo.importance.names import heads_key, mlp_key
from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.pruning.least_squares import columns_of, damped


@dataclass(frozen=True)
class Elimination:
    """An elimination orders the units of a linear map's input and says what their removal costs."""

    order: Tensor
    """`[n]` int64: the units in order of removal."""
    error: Tensor
    """`[n + 1]` float64: ``tr((W' - W) (C + D) (W' - W)^T)`` without the first units of the order, the
    others refitted; entry i is without i units."""

    def kept(self, num: int) -> Tensor:
        """Return the `num` units that are removed last, ascending."""
        return self.order[len(self.order) - num :].sort().values


def eliminate(
    weight_OE: Tensor, moment_EE: Tensor, ridge: float, *, unit: int = 1, groups: int = 1, at_once: int = 1
) -> Elimination:
    """Remove all units, first those whose loss the others can best make up for.

    With ``P = (C + D)^-1`` and W the refitted map, removing the unit j costs ``tr(W_j P_jj^-1 W_j^T)`` and
    leaves ``W -= W_j P_jj^-1 P_j:`` and ``P -= P_:j P_jj^-1 P_j:``.

    Args:
        unit: Inputs of one unit, side by side: the width of a head, or 1.
        groups: Units side by side that form one group; in turn each group gives up `at_once` of its units.
        at_once: Units that are removed together. More is faster and a little worse.
    """
    weight_OE, inverse_EE = weight_OE.double().clone(), torch.linalg.inv(damped(moment_EE, ridge))
    num = weight_OE.shape[1] // unit
    per_group = num // groups
    is_left = torch.ones(groups, per_group, dtype=torch.bool, device=weight_OE.device)
    order: list[Tensor] = []
    error = torch.zeros(num + 1, dtype=torch.float64)
    while bool(is_left.any()):
        for group in range(groups):
            units = _cheapest_first(weight_OE, inverse_EE, unit, is_left, group)[:at_once]
            cost = _remove(weight_OE, inverse_EE, columns_of(units, unit))
            num_removed = sum(map(len, order))
            # Units that are removed together share the cost of their removal.
            steps = torch.arange(1, len(units) + 1, dtype=torch.float64) / len(units)
            error[num_removed + 1 : num_removed + len(units) + 1] = error[num_removed] + cost * steps
            order.append(units)
            is_left.view(-1)[units] = False
    return Elimination(torch.cat(order).cpu(), error)


def _cheapest_first(weight_OE: Tensor, inverse_EE: Tensor, unit: int, is_left: Tensor, group: int) -> Tensor:
    """Return the units of a group that are left, the one whose removal costs least first."""
    units = is_left[group].nonzero().flatten() + group * is_left.shape[1]
    if unit == 1:
        cost = weight_OE[:, units].square().sum(dim=0) / inverse_EE.diagonal()[units]
    else:
        columns = columns_of(units, unit).view(-1, unit)
        inverse_nEE = torch.stack([inverse_EE[inputs][:, inputs] for inputs in columns])
        weight_nOE = torch.stack([weight_OE[:, inputs] for inputs in columns])
        cost = (torch.linalg.solve(inverse_nEE, weight_nOE, left=False) * weight_nOE).sum(dim=(1, 2))
    return units[cost.argsort(stable=True)]


def _remove(weight_OE: Tensor, inverse_EE: Tensor, columns: Tensor) -> float:
    """Remove columns from the map and from the inverse, in place; return the cost."""
    rows = inverse_EE[columns]
    share = torch.linalg.solve(rows[:, columns], weight_OE[:, columns], left=False)
    cost = float((share * weight_OE[:, columns]).sum())
    inverse_EE -= rows.T @ torch.linalg.solve(rows[:, columns], rows)
    weight_OE -= share @ rows
    weight_OE[:, columns] = 0
    return cost


FILE = "elimination.safetensors"


ELIMINATION_STEPS = 48
"""Number of steps in which the neurons of a layer are eliminated: of 1536 neurons, 32 are removed at once."""


def eliminate_layer(
    layer: int, teacher: Dims, source: ParameterSource, moment: Callable[[str], Tensor], ridge: float
) -> dict[str, Tensor]:
    """Eliminate the units of one layer, of a layer with experts the heads alone: orders and errors by name."""
    proj_OE = source(f"decoder.layers.{layer}.self_attention.linear_proj.weight")
    moment_EE = moment(heads_key(layer))
    heads = eliminate(proj_OE, moment_EE, ridge, unit=teacher.head_dim, groups=teacher.num_query_groups)
    tensors = _named(heads_key(layer), heads, proj_OE, moment_EE)
    if not teacher.num_experts:
        fc2_OE, moment_EE = source(f"decoder.layers.{layer}.mlp.linear_fc2.weight"), moment(mlp_key(layer))
        at_once = -(-teacher.ffn_hidden_size // ELIMINATION_STEPS)
        neurons = eliminate(fc2_OE, moment_EE, ridge, at_once=at_once)
        tensors |= _named(mlp_key(layer), neurons, fc2_OE, moment_EE)
    return tensors


def _named(name: str, elimination: Elimination, weight_OE: Tensor, moment_EE: Tensor) -> dict[str, Tensor]:
    """Name order and error, the error as a share of the map's whole output."""
    weight_OE = weight_OE.double()
    whole = float(((weight_OE @ moment_EE.double()) * weight_OE).sum())
    error = elimination.error / whole if whole > 0 else elimination.error * 0
    return {f"{name}.order": elimination.order, f"{name}.error": error}


def ranking(elimination: dict[str, Tensor], scores: dict[str, Tensor], axes: list[str]) -> dict[str, Tensor]:
    """Replace the scores of the named axes (`mlp`, `heads`) by the units' ranks in the order of removal."""
    replaced = dict(scores)
    for name, order in elimination.items():
        key = name.removesuffix(".order")
        if key != name and key.split(".")[-1] in axes:
            ranks = torch.empty(len(order), dtype=torch.float32)
            ranks[order] = torch.arange(len(order), dtype=torch.float32)
            replaced[key] = ranks
    return replaced
