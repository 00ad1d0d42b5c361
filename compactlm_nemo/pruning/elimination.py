"""Which units a layer can best spare, by the error that is left after refitting, and what sparing them costs.

One elimination per layer and axis gives the order of removal and the error at every size. Layers are shared out over
all ranks; the file belongs to the model::

    layers.{i}.mlp.order      [F]          int64, the neuron that goes first, first
    layers.{i}.mlp.error      [F + 1]      float64, share of fc2's output that is lost when so many have gone
    layers.{i}.heads.order    [heads]      query heads, one of every group in turn
    layers.{i}.heads.error    [heads + 1]
    hidden.error              [H + 1]      share of the normed stream that is lost when so many channels have gone
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compactlm_nemo.importance.moments import mlp_key as mlp_moment
from compactlm_nemo.importance.moments import proj_key as proj_moment
from compactlm_nemo.importance.scores import heads_key, mlp_key
from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.pruning.least_squares import columns_of, damped


@dataclass(frozen=True)
class Elimination:
    """The units of a linear map's input in the order in which they can best be spared."""

    order: Tensor
    """`[n]` int64: the unit that goes first, first."""
    error: Tensor
    """`[n + 1]` float64: ``tr((W' - W) (C + D) (W' - W)^T)`` when so many have gone and the rest is refitted."""

    def kept(self, num: int) -> Tensor:
        """The `num` units that go last, ascending."""
        return self.order[len(self.order) - num :].sort().values


def eliminate(
    weight_OE: Tensor, moment_EE: Tensor, ridge: float, *, unit: int = 1, groups: int = 1, at_once: int = 1
) -> Elimination:
    """Backward elimination: the units whose loss the others can best make up for go first, until none is left.

    With ``P = (C + D)^-1`` and W the map refitted so far, removing the unit j costs ``tr(W_j P_jj^-1 W_j^T)`` and
    leaves ``W -= W_j P_jj^-1 P_j:`` and ``P -= P_:j P_jj^-1 P_j:``.

    Args:
        unit: Inputs of one unit, side by side: the width of a head, or 1.
        groups: Units side by side that form one group; in turn each group gives up `at_once` of its units.
        at_once: Units that go together. More is faster and a little worse.
    """
    weight_OE, inverse_EE = weight_OE.double().clone(), torch.linalg.inv(damped(moment_EE, ridge))
    num = weight_OE.shape[1] // unit
    per_group = num // groups
    alive = torch.ones(groups, per_group, dtype=torch.bool, device=weight_OE.device)
    order: list[Tensor] = []
    error = torch.zeros(num + 1, dtype=torch.float64)
    while bool(alive.any()):
        for group in range(groups):
            going = _least(weight_OE, inverse_EE, unit, alive, group)[:at_once]
            columns = columns_of(going, unit)
            cost = _remove(weight_OE, inverse_EE, columns)
            gone = sum(map(len, order))
            # Units that go together share what that costs.
            steps = torch.arange(1, len(going) + 1, dtype=torch.float64) / len(going)
            error[gone + 1 : gone + len(going) + 1] = error[gone] + cost * steps
            order.append(going)
            alive.view(-1)[going] = False
    return Elimination(torch.cat(order).cpu(), error)


def _least(weight_OE: Tensor, inverse_EE: Tensor, unit: int, alive: Tensor, group: int) -> Tensor:
    """The units of a group that are left, the cheapest to remove first."""
    units = alive[group].nonzero().flatten() + group * alive.shape[1]
    if unit == 1:
        cost = weight_OE[:, units].square().sum(dim=0) / inverse_EE.diagonal()[units]
    else:
        columns = columns_of(units, unit).view(-1, unit)
        own = torch.stack([inverse_EE[mine][:, mine] for mine in columns])
        weight_nOE = torch.stack([weight_OE[:, mine] for mine in columns])
        cost = (torch.linalg.solve(own, weight_nOE, left=False) * weight_nOE).sum(dim=(1, 2))
    return units[cost.argsort(stable=True)]


def _remove(weight_OE: Tensor, inverse_EE: Tensor, columns: Tensor) -> float:
    """Take columns out of the map and of the inverse, in place; what that costs."""
    rows = inverse_EE[columns]
    share = torch.linalg.solve(rows[:, columns], weight_OE[:, columns], left=False)
    cost = float((share * weight_OE[:, columns]).sum())
    inverse_EE -= rows.T @ torch.linalg.solve(rows[:, columns], rows)
    weight_OE -= share @ rows
    weight_OE[:, columns] = 0
    return cost


FILE = "spare.safetensors"


ELIMINATION_STEPS = 48
"""Steps in which the neurons of a layer are eliminated: as many at once as that takes, 32 of 1536."""


def spare_layer(
    layer: int, teacher: Dims, source: ParameterSource, moment: Callable[[str], Tensor], ridge: float
) -> dict[str, Tensor]:
    """Orders and errors of one layer; of a layer with experts the heads alone."""
    proj_OE = source(f"decoder.layers.{layer}.self_attention.linear_proj.weight")
    moment_EE = moment(proj_moment(layer))
    heads = eliminate(proj_OE, moment_EE, ridge, unit=teacher.head_dim, groups=teacher.num_query_groups)
    found = _named(heads_key(layer), heads, proj_OE, moment_EE)
    if not teacher.num_experts:
        fc2_OE, moment_EE = source(f"decoder.layers.{layer}.mlp.linear_fc2.weight"), moment(mlp_moment(layer))
        at_once = -(-teacher.ffn_hidden_size // ELIMINATION_STEPS)
        neurons = eliminate(fc2_OE, moment_EE, ridge, at_once=at_once)
        found |= _named(mlp_key(layer), neurons, fc2_OE, moment_EE)
    return found


def _named(name: str, found: Elimination, weight_OE: Tensor, moment_EE: Tensor) -> dict[str, Tensor]:
    weight_OE = weight_OE.double()
    whole = float(((weight_OE @ moment_EE.double()) * weight_OE).sum())
    return {f"{name}.order": found.order, f"{name}.error": found.error / whole if whole > 0 else found.error * 0}


def ranking(spare: dict[str, Tensor], scores: dict[str, Tensor], axes: list[str]) -> dict[str, Tensor]:
    """The scores, with those of the named axes (`mlp`, `heads`) replaced by the place in the order of removal."""
    replaced = dict(scores)
    for name, order in spare.items():
        key = name.removesuffix(".order")
        if key != name and key.split(".")[-1] in axes:
            place = torch.empty(len(order), dtype=torch.float32)
            place[order] = torch.arange(len(order), dtype=torch.float32)
            replaced[key] = place
    return replaced
