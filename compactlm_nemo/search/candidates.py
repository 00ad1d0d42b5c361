"""A candidate is an architecture with its costs and the share of the measured importance that it keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.importance.names import (
    DEPTH,
    HIDDEN,
    expert_mlp_key,
    experts_key,
    heads_key,
    mlp_key,
    shared_expert_key,
)
from compactlm_nemo.importance.selection import check_scores, keep_heads, keep_layers, kept_share
from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import counts


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One architecture with the numbers that rank it; `dataclasses.asdict` gives the JSON form."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    experts: int
    shared_expert_ffn: int
    params: int
    active_params: int
    memory_bytes: int
    """Bytes as the budget `search.memory_bytes` counts them."""
    flops_per_token: int
    """FLOPs as the budget `search.flops` counts them."""
    kept_importance: float
    """Share of the teacher's importance that the cut keeps, in [0, 1]."""
    latency_ms: float | None = None
    """Milliseconds from timed layers; None without a budget."""
    predicted_loss: float | None = None
    """A proxy (`search.predicted_loss`), in nats only by `search.depth=lm_loss`; None without second moments."""
    zero_shot_loss: float | None = None
    """LM loss in nats right after the cut; None where it was not measured."""

    candidate: int | None = None
    """Index into candidates.json, in a ranking."""
    loss: float | None = None
    """Validation loss in nats after a short distillation, in a ranking."""

    def dims(self, teacher: Dims) -> Dims:
        """Give the teacher's architecture the sizes of this candidate."""
        return teacher.with_shape(**{axis: getattr(self, axis) for axis in AXES})


def candidates_json(ranked: list[Candidate]) -> str:
    """Write a list with one line a candidate; numbers that are not known are left out."""
    rows = [{name: value for name, value in asdict(c).items() if value is not None} for c in ranked]
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n"


def depth_share(depth: Tensor, num: int) -> float:
    """Return the share of the layers' importance that stays (`kept_share`); of blocks exp(-score of the removed)."""
    layers = keep_layers(depth, num)
    if depth.dim() == 1:
        return kept_share(depth, layers)
    if num == len(depth):
        return 1.0
    return math.exp(-max(0.0, float(depth[:, len(depth) - num - 1].nan_to_num(torch.inf).min())))


def kept_importance(teacher: Dims, scores: dict[str, Tensor]) -> Callable[[Dims], float]:
    """Make a function of the student: ``share(hidden) * mean_l share(heads_l) * mean_l share(MLP_l) * share(depth)``.

    share is the part of the score mass held by the units that stay and l runs over all layers of the teacher. Of a
    layer with experts the MLP's share is that of its experts times the mean share of their neurons (and of the shared
    expert's). Each share is worked out once for a value of its axis, however many students have it.
    """
    layers = range(teacher.num_layers)

    @cache
    def curve(name: str) -> list[float]:
        """Return the share that the best n units hold, for n from 0 on."""
        mass_E = scores[name].cpu().double().clamp(min=0).sort(descending=True).values
        sum_E = torch.cat([mass_E.new_zeros(1), mass_E.cumsum(0)])
        shares: list[float] = (sum_E / sum_E[-1]).tolist() if sum_E[-1] > 0 else [1.0] * len(sum_E)
        return shares

    def mlp_of(layer: int, ffn: int, experts: int, shared: int) -> float:
        if teacher.is_dense(layer):
            return 1.0 if teacher.num_experts else curve(mlp_key(layer))[ffn]
        neurons = [curve(expert_mlp_key(layer, e))[ffn] for e in range(teacher.num_experts)]
        if teacher.shared_expert_ffn:
            neurons.append(curve(shared_expert_key(layer))[shared])
        return curve(experts_key(layer))[experts] * sum(neurons) / len(neurons)

    @cache
    def mlp(*sizes: int) -> float:
        return sum(mlp_of(i, *sizes) for i in layers) / len(layers)

    @cache
    def heads(count: int, groups: int) -> float:
        cut = teacher.with_shape(heads=count, groups=groups)
        shares = [kept_share(scores[heads_key(i)], keep_heads(i, teacher, cut, scores)) for i in layers]
        return sum(shares) / len(layers)

    depth = cache(lambda num: depth_share(scores[DEPTH], num))
    return lambda student: (
        curve(HIDDEN)[student.hidden_size]
        * heads(student.num_heads, student.num_query_groups)
        * mlp(student.ffn_hidden_size, student.num_experts, student.shared_expert_ffn)
        * depth(student.num_layers)
    )


def rank_candidates(
    teacher: Dims, candidates: list[Dims], scores: dict[str, Tensor], cfg: SearchConfig
) -> list[Candidate]:
    """Rank the candidates by `kept_importance`, best first; of equals the smaller model, then the order given."""
    check_scores(teacher, scores)
    count, share = counts(cfg), kept_importance(teacher, scores)
    ranked = [
        Candidate(
            **dims.shape(),
            params=count["params"](dims),
            active_params=count["active_params"](dims),
            memory_bytes=count["memory_bytes"](dims),
            flops_per_token=count["flops"](dims),
            kept_importance=share(dims),
        )
        for dims in candidates
    ]
    return sorted(ranked, key=lambda c: (-c.kept_importance, c.params))
