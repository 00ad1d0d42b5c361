"""What is refitted on second moments: the maps that lose inputs, and how the residual stream is turned.

`RefittedWriters` gives the teacher's parameters with output projections and fc2 refitted to their kept inputs; the cut
(`pruning.cut`) then takes those columns. Every rank reads what it needs, one whole parameter and its second moments at
a time, so the result is the same in every layout.
"""

from __future__ import annotations

from torch import Tensor

from compactlm_nemo.importance.moments import expert_key, mlp_key, proj_key, shared_expert_key
from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.pruning.block_replacement import BlockReplacement, bridge_weight
from compactlm_nemo.pruning.cut import EXPERT, split_name
from compactlm_nemo.pruning.least_squares import columns_of, refit
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.pruning.residual_stream import Moment


class RefittedWriters:
    """Teacher parameters; maps that lose inputs are refitted in the columns that stay and unchanged in the others."""

    def __init__(
        self,
        teacher: Dims,
        plan: Plan,
        source: ParameterSource,
        moment: Moment,
        ridge: float,
        bridges: dict[int, BlockReplacement],
    ) -> None:
        self.teacher, self.plan, self.source, self.moment, self.ridge = teacher, plan, source, moment, ridge
        self.bridges = bridges

    def __call__(self, name: str) -> Tensor:
        full = self.source(name)
        if not name.startswith("decoder.layers."):
            return full
        layer, rest = split_name(name)
        if rest == "mlp.linear_fc2.weight" and layer in self.bridges:
            kept, full = self.plan.mlp[layer], full.clone()
            full[:, kept] = bridge_weight(full, self.bridges[layer], kept).to(full.dtype)
            return full
        lost = self._inputs(layer, rest)
        return self._refitted(full, *lost) if lost else full

    def _inputs(self, layer: int, rest: str) -> tuple[str, Tensor] | None:
        """Second moments of a map's input and the inputs that stay; None of a parameter that keeps all of them."""
        if rest == "self_attention.linear_proj.weight":
            return proj_key(layer), columns_of(self.plan.heads[layer], self.teacher.head_dim)
        if rest == "mlp.linear_fc2.weight":
            return mlp_key(layer), self.plan.mlp[layer]
        if rest == "mlp.shared_experts.linear_fc2.weight":
            return shared_expert_key(layer), self.plan.shared_expert[layer]
        if (routed := EXPERT.fullmatch(rest)) and routed[3] == ".linear_fc2.weight":
            expert = int(routed[2])
            return expert_key(layer, expert), self.plan.expert_mlp[layer][expert]
        return None

    def _refitted(self, full_OE: Tensor, moment: str, kept: Tensor) -> Tensor:
        if len(kept) == full_OE.shape[1]:
            return full_OE
        full_OE = full_OE.clone()
        full_OE[:, kept] = refit(full_OE, self.moment(moment), kept, self.ridge).to(full_OE.dtype)
        return full_OE
