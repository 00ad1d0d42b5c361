"""Reconstruction refits the maps that lose inputs on second moments, parameter by parameter.

`RefittedWriters` gives the teacher's parameters with output projections and fc2 refitted to their kept inputs; the cut
(`pruning.cut`) then takes those columns. Every rank reads what the rank needs, one whole parameter and its second
moments at a time, so every layout gives one result.
"""

from __future__ import annotations

from torch import Tensor

from compactlm_nemo.importance.names import expert_mlp_key, heads_key, mlp_key, shared_expert_key
from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.pruning.block_replacement import BlockReplacement, replacement_weight
from compactlm_nemo.pruning.cut import EXPERT, split_name
from compactlm_nemo.pruning.least_squares import columns_of, refit
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.pruning.residual_stream import Moment


class RefittedWriters:
    """Teacher parameters, of which maps that lose inputs are refitted in the columns that stay, else unchanged."""

    def __init__(
        self,
        teacher: Dims,
        plan: Plan,
        source: ParameterSource,
        moment: Moment,
        ridge: float,
        replacements: dict[int, BlockReplacement],
    ) -> None:
        self.teacher, self.plan, self.source, self.moment, self.ridge = teacher, plan, source, moment, ridge
        self.replacements = replacements

    def __call__(self, name: str) -> Tensor:
        full = self.source(name)
        if not name.startswith("decoder.layers."):
            return full
        layer, rest = split_name(name)
        if rest == "mlp.linear_fc2.weight" and layer in self.replacements:
            neurons, full = self.plan.mlp[layer], full.clone()
            full[:, neurons] = replacement_weight(full, self.replacements[layer], neurons).to(full.dtype)
            return full
        cut = self._inputs(layer, rest)
        return self._refitted(full, *cut) if cut else full

    def _inputs(self, layer: int, rest: str) -> tuple[str, Tensor] | None:
        """Name the second moments of a map's input, and the inputs that stay; None for other parameters."""
        if rest == "self_attention.linear_proj.weight":
            return heads_key(layer), columns_of(self.plan.heads[layer], self.teacher.head_dim)
        if rest == "mlp.linear_fc2.weight" and layer in self.plan.mlp:
            return mlp_key(layer), self.plan.mlp[layer]
        if rest == "mlp.shared_experts.linear_fc2.weight":
            return shared_expert_key(layer), self.plan.shared_expert[layer]
        if (routed := EXPERT.fullmatch(rest)) and routed[3] == ".linear_fc2.weight":
            expert = int(routed[2])
            return expert_mlp_key(layer, expert), self.plan.expert_mlp[layer][expert]
        return None

    def _refitted(self, full_OE: Tensor, moment: str, inputs: Tensor) -> Tensor:
        if len(inputs) == full_OE.shape[1]:
            return full_OE
        full_OE = full_OE.clone()
        full_OE[:, inputs] = refit(full_OE, self.moment(moment), inputs, self.ridge).to(full_OE.dtype)
        return full_OE
