"""Least squares refits the kept columns of a cut linear map, so that they also do the work of the removed ones.

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
    """Damp the moments: ``C + ridge * mean(diag C) * I`` in float64, positive in any case, silent inputs or not."""
    moment_EE = moment_EE.double()
    size = float(moment_EE.diagonal().mean())
    damping = max(ridge * size, torch.finfo(torch.float64).tiny)
    return moment_EE + damping * torch.eye(len(moment_EE), dtype=torch.float64, device=moment_EE.device)


def refit(weight_OE: Tensor, moment_EE: Tensor, inputs: Tensor, ridge: float) -> Tensor:
    """Refit the columns `inputs` of a linear map, so that the work of the others is folded in: `[O, K]` float64.

    Where nothing is removed the weight stays as it is.
    """
    weight_OE, moment_EE = weight_OE.double(), moment_EE.double()
    removed = others(inputs, weight_OE.shape[1])
    if not len(removed):
        return weight_OE[:, inputs]
    cross_OK = weight_OE[:, removed] @ moment_EE[removed][:, inputs]
    inner_KK = damped(moment_EE, ridge)[inputs][:, inputs]
    return weight_OE[:, inputs] + torch.linalg.solve(inner_KK, cross_OK, left=False)


def others(inputs: Tensor, size: int) -> Tensor:
    """Return the indices below `size` that are not in `inputs`, ascending."""
    is_removed = torch.ones(size, dtype=torch.bool)
    is_removed[inputs.cpu()] = False
    return is_removed.nonzero().flatten().to(inputs.device)


def output_error(weight_OE: Tensor, moment_EE: Tensor, inputs: Tensor, cut_OK: Tensor) -> float:
    """Return the share of its output that a cut map gets wrong, ``sum of |W x - W' x_k|^2 / sum of |W x|^2``."""
    gap_OE = weight_OE.double().clone()
    gap_OE[:, inputs] -= cut_OK.double()
    lost, whole = (float(((x @ moment_EE.double()) * x).sum()) for x in (gap_OE, weight_OE.double()))
    return lost / whole if whole > 0 else 0.0


def columns_of(units: Tensor, unit: int) -> Tensor:
    """Return the inputs of the given units, unit after unit."""
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()
