"""Which units stay, and how much of the measured importance a candidate keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.errors import ConfigError, NumericsError
from compactlm_nemo.importance.scores import (
    DEPTH,
    HIDDEN,
    expert_mlp_key,
    experts_key,
    groups_key,
    heads_key,
    mlp_key,
    shared_expert_key,
)
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import counts


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One architecture with its rank information; `dataclasses.asdict` gives its JSON form."""

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
    """As the budget of that name counts them."""
    flops_per_token: int
    """The same."""
    kept_importance: float
    """Share of the teacher's importance that the cut keeps, in [0, 1]."""
    latency_ms: float | None = None
    """From timed layers; None without a budget."""
    damage: float | None = None
    """Predicted damage (`search.damage`); None without second moments."""
    zero_shot: float | None = None
    """LM loss in nats right after the cut; None where it was not measured."""

    candidate: int | None = None
    """Its place in candidates.json, in a ranking."""
    loss: float | None = None
    """Validation loss in nats after a short distillation, in a ranking."""

    def dims(self, teacher: Dims) -> Dims:
        """The teacher's architecture in this candidate's sizes."""
        return teacher.with_shape(
            layers=self.layers,
            hidden=self.hidden,
            ffn=self.ffn,
            heads=self.heads,
            groups=self.groups,
            experts=self.experts,
            shared_expert_ffn=self.shared_expert_ffn,
        )


def candidates_json(ranked: list[Candidate]) -> str:
    """A list with one line a candidate; what is not known is left out."""
    rows = [{name: value for name, value in asdict(c).items() if value is not None} for c in ranked]
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n"


def check_scores(teacher: Dims, scores: dict[str, Tensor]) -> None:
    """ConfigError unless every score vector is there in the teacher's length; NumericsError on NaN or infinity.

    Scores of query groups may be missing: only a cut of groups needs them.
    """
    groups = {groups_key(i): teacher.num_query_groups for i in range(teacher.num_layers) if groups_key(i) in scores}
    for name, length in (_lengths(teacher) | groups).items():
        if name not in scores:
            raise ConfigError(f"scores: {name} is missing; run the score stage on this teacher.")
        if name == DEPTH and tuple(scores[name].shape) == (length, length):
            continue  # of blocks: not every one fits or was measured
        if tuple(scores[name].shape) != (length,):
            raise ConfigError(
                f"scores: {name} has shape {list(scores[name].shape)}, the teacher needs [{length}]; "
                "they belong to another model: run the score stage on this teacher."
            )
        if not bool(scores[name].isfinite().all()):
            raise NumericsError(f"scores: {name} holds NaN or infinity; run the score stage again in fp32.")
    extra = f"layers.{teacher.num_layers}."
    if any(name.startswith(extra) for name in scores):
        raise ConfigError(f"scores: {extra}* is beyond the teacher's {teacher.num_layers} layers; score this teacher.")


def _lengths(teacher: Dims) -> dict[str, int]:
    """The vectors that every cut needs."""
    expected = {HIDDEN: teacher.hidden_size, DEPTH: teacher.num_layers}
    for i in range(teacher.num_layers):
        expected[heads_key(i)] = teacher.num_heads
        if not teacher.num_experts:
            expected[mlp_key(i)] = teacher.ffn_hidden_size
            continue
        expected[experts_key(i)] = teacher.num_experts
        expected |= {expert_mlp_key(i, e): teacher.ffn_hidden_size for e in range(teacher.num_experts)}
        if teacher.shared_expert_ffn:
            expected[shared_expert_key(i)] = teacher.shared_expert_ffn
    return expected


def top_units(score_E: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores, ascending, int64 on the CPU; of equal scores the lower index stays."""
    order = torch.sort(score_E.cpu(), descending=True, stable=True).indices
    return order[:k].sort().values


def keep_layers(depth: Tensor, num: int) -> Tensor:
    """The layers that stay, ascending.

    By scores `[L]` the `num` highest, scattered; by scores of blocks `[L, L]` (the block of n layers from layer i at
    ``[i, n - 1]``) all but the block that matters least, the first of equals.
    """
    if depth.dim() == 1:
        return top_units(depth, num)
    layers = torch.arange(len(depth))
    gone = len(depth) - num
    if not gone:
        return layers
    block_L = depth[:, gone - 1].cpu()
    if bool(block_L.isnan().all()):
        raise ConfigError(
            f"search.depth scores no blocks of {gone} layers, which search.layers={num} takes out; add {gone} to "
            "score.block_lengths."
        )
    start = int(block_L.nan_to_num(torch.inf).argmin())
    return layers[(layers < start) | (layers >= start + gone)]


def depth_share(depth: Tensor, num: int) -> float:
    """How much of the importance of layers stays: as `kept_share`; of blocks exp(-score of the removed one)."""
    kept = keep_layers(depth, num)
    if depth.dim() == 1:
        return kept_share(depth, kept)
    if num == len(depth):
        return 1.0
    return math.exp(-max(0.0, float(depth[:, len(depth) - num - 1].nan_to_num(torch.inf).min())))


def keep_heads(layer: int, teacher: Dims, student: Dims, scores: dict[str, Tensor]) -> Tensor:
    """Indices of the query heads of a layer that stay, ascending: the best of each kept group.

    Whole groups go by their own scores. Head h belongs to group ``h // (heads / groups)``.
    """
    groups = torch.arange(teacher.num_query_groups)
    if student.num_query_groups < len(groups):
        if groups_key(layer) not in scores:
            raise ConfigError(f"scores: {groups_key(layer)} is missing; run the score stage on this teacher.")
        groups = top_units(scores[groups_key(layer)], student.num_query_groups)
    by_group = scores[heads_key(layer)].cpu().view(teacher.num_query_groups, -1)
    num_kept = student.num_heads // student.num_query_groups
    return torch.cat([top_units(by_group[g], num_kept) + g * by_group.shape[1] for g in groups.tolist()])


def kept_share(score_E: Tensor, kept: Tensor) -> float:
    """``sum over kept of s / sum of s``, negative scores counted as 0; 1 when there is nothing to lose."""
    mass_E = score_E.cpu().double().clamp(min=0)
    total = float(mass_E.sum())
    return float(mass_E[kept].sum()) / total if total > 0 else 1.0


def kept_importance(teacher: Dims, scores: dict[str, Tensor]) -> Callable[[Dims], float]:
    """A function of the student: ``share(hidden) * mean_l share(heads_l) * mean_l share(MLP_l) * share(depth)``.

    share is the part of the score mass held by the units that stay and l runs over all layers of the teacher. Of a
    layer with experts the MLP's share is that of its experts times the mean share of their neurons (and of the shared
    expert's). Each share is worked out once for a value of its axis, however many students have it.
    """
    layers = range(teacher.num_layers)

    @cache
    def curve(name: str) -> list[float]:
        """Share that the best n units hold, for n from 0 on."""
        mass_E = scores[name].cpu().double().clamp(min=0).sort(descending=True).values
        kept_E = torch.cat([mass_E.new_zeros(1), mass_E.cumsum(0)])
        held: list[float] = (kept_E / kept_E[-1]).tolist() if kept_E[-1] > 0 else [1.0] * len(kept_E)
        return held

    def mlp_of(layer: int, ffn: int, experts: int, shared: int) -> float:
        if not teacher.num_experts:
            return curve(mlp_key(layer))[ffn]
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
        kept = [kept_share(scores[heads_key(i)], keep_heads(i, teacher, cut, scores)) for i in layers]
        return sum(kept) / len(layers)

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
    """Candidates by `kept_importance`, best first; of equals the smaller model, then the order given."""
    check_scores(teacher, scores)
    count, kept = counts(cfg), kept_importance(teacher, scores)
    ranked = [
        Candidate(
            layers=dims.num_layers,
            hidden=dims.hidden_size,
            ffn=dims.ffn_hidden_size,
            heads=dims.num_heads,
            groups=dims.num_query_groups,
            experts=dims.num_experts,
            shared_expert_ffn=dims.shared_expert_ffn,
            params=count["params"](dims),
            active_params=count["active_params"](dims),
            memory_bytes=count["memory_bytes"](dims),
            flops_per_token=count["flops"](dims),
            kept_importance=kept(dims),
        )
        for dims in candidates
    ]
    return sorted(ranked, key=lambda c: (-c.kept_importance, c.params))
