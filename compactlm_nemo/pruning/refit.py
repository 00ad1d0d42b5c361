"""What a cut linear map should become: its kept columns, refitted so that they also do the work of the removed ones.

With C = sum x x^T over calibration tokens of the map's input x, kept columns k, removed columns r and a ridge D, the
minimum of ``tr((W' - W) (C + D) (W' - W)^T)`` over maps that read k alone is

    W'_k = W_k + W_r C_rk (C_kk + D_kk)^-1,        D = ridge * mean(diag C) * I,

which is the plain cut where nothing of r can be told from k. All numbers are float64.

Shape suffixes: O outputs, E inputs, K kept inputs, n units (a head is a unit of several inputs, a neuron of one).
Source: least squares, as in SparseGPT (arXiv 2301.00774) and Optimal Brain Surgeon (Hassibi and Stork 1993).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def damped(moment_EE: Tensor, ridge: float) -> Tensor:
    """``C + ridge * mean(diag C) * I`` in float64; positive in any case, so that silent inputs can be solved."""
    moment_EE = moment_EE.double()
    size = float(moment_EE.diagonal().mean())
    return moment_EE + max(ridge * size, torch.finfo(torch.float64).tiny) * torch.eye(len(moment_EE)).to(moment_EE)


def refit(weight_OE: Tensor, moment_EE: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """`[O, K]` float64: the columns `kept` of a linear map with what the others did folded in.

    Nothing removed gives the weight itself.
    """
    weight_OE, moment_EE = weight_OE.double(), moment_EE.double()
    removed = others(kept, weight_OE.shape[1])
    if not len(removed):
        return weight_OE[:, kept]
    cross_OK = weight_OE[:, removed] @ moment_EE[removed][:, kept]
    inner_KK = damped(moment_EE, ridge)[kept][:, kept]
    return weight_OE[:, kept] + torch.linalg.solve(inner_KK, cross_OK, left=False)


def others(kept: Tensor, size: int) -> Tensor:
    """The indices below `size` that are not in `kept`, ascending."""
    is_removed = torch.ones(size, dtype=torch.bool)
    is_removed[kept.cpu()] = False
    return is_removed.nonzero().flatten().to(kept.device)


def output_error(weight_OE: Tensor, moment_EE: Tensor, kept: Tensor, cut_OK: Tensor) -> float:
    """``sum over tokens of |W x - W' x_k|^2 / sum of |W x|^2``: the share of its output that a cut map gets wrong."""
    gap_OE = weight_OE.double().clone()
    gap_OE[:, kept] -= cut_OK.double()
    lost, whole = (float(((x @ moment_EE.double()) * x).sum()) for x in (gap_OE, weight_OE.double()))
    return lost / whole if whole > 0 else 0.0


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


def columns_of(units: Tensor, unit: int) -> Tensor:
    """Inputs of the given units, unit after unit."""
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()
