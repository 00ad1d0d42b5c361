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

import torch
from torch import Tensor

from compactlm_nemo.importance.moments import mlp_key as mlp_moment
from compactlm_nemo.importance.moments import proj_key as proj_moment
from compactlm_nemo.importance.scores import heads_key, mlp_key
from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.pruning.refit import Elimination, eliminate

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
