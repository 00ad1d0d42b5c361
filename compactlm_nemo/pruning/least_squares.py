"""What a cut linear map should become: its kept columns, refitted so that they also do the work of the removed ones.

With C = sum x x^T over calibration tokens of the map's input x, kept columns k, removed columns r and a ridge D, the
minimum of ``tr((W' - W) (C + D) (W' - W)^T)`` over maps that read k alone is

    W'_k = W_k + W_r C_rk (C_kk + D_kk)^-1,        D = ridge * mean(diag C) * I,

which is the plain cut where nothing of r can be told from k. All numbers are float64.

Shape suffixes: O outputs, E inputs, K kept inputs, n units (a head is a unit of several inputs, a neuron of one).
Source: least squares, as in SparseGPT (arXiv 2301.00774) and Optimal Brain Surgeon (Hassibi and Stork 1993).
"""

from __future__ import annotations

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


def columns_of(units: Tensor, unit: int) -> Tensor:
    """Inputs of the given units, unit after unit."""
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()
