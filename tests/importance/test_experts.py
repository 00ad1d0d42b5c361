"""The places of tokens go with the tokens: an expert's rows are of the samples that scoring takes them for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.load import compose
from compactlm_nemo.config.score import ExpertMetric
from compactlm_nemo.importance.experts import TokenPlaces
from compactlm_nemo.importance.scores import Scores
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.parallel.collectives import all_gather
from compactlm_nemo.stages.search import search_problems
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.shapes import TINY
from tests.support.tiny_models import VOCAB, save_tiny

CASE = "qwen2_moe"
BATCH, LENGTH = 3, 8
"""No token is there twice, so that a row belongs to one place."""


def _rows_are_of_their_samples(rank: int, world: int, layout: dict[str, Any], root: Path) -> None:
    mesh = mesh_of(**layout)
    _, model = filled(root / CASE, mesh)
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    tokens_BS = torch.randperm(VOCAB, generator=generator)[: BATCH * LENGTH].view(BATCH, LENGTH)
    seen = []
    for layer in model.layers():
        moe: Any = layer.mlp
        inputs: list[Tensor] = []
        places = TokenPlaces(mesh, moe, lambda: None)
        places.follow()
        moe.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].detach()))
        seen.append((moe, places, inputs, rows := []))
        moe.experts.register_forward_pre_hook(lambda _, args, rows=rows: rows.append((args[0].detach(), args[1])))
    forward_each(model, [tokens_BS], lambda _, hidden_SBH: hidden_SBH)
    for moe, places, inputs, rows in seen:
        [hidden_SBH], [(row_NH, count_E)] = inputs, rows
        if mesh.is_sequence_parallel:
            hidden_SBH = all_gather(hidden_SBH, mesh.tp_group, dim=0)
        group_SBH = all_gather(hidden_SBH, mesh.ep_group, dim=1) if mesh.ep_size > 1 else hidden_SBH
        assert places.num_samples == group_SBH.shape[1] and places.length == group_SBH.shape[0]
        # [N, S * samples of the group]: each row is equal to the state of one place.
        is_equal = (row_NH[:, None] == group_SBH.flatten(0, 1)).all(dim=-1)
        assert (is_equal.sum(dim=1) == 1).all()
        want = [place % places.num_samples for place in is_equal.int().argmax(dim=1).tolist()]
        assert [len(sample_N) for sample_N in places.samples] == count_E.tolist()
        assert torch.cat(places.samples).tolist() == want
        total = torch.tensor([len(want)])
        if mesh.ep_size > 1:
            total = all_gather(total, mesh.ep_group, dim=0).sum()
        assert total == moe.config.moe_router_topk * group_SBH.shape[0] * group_SBH.shape[1]


@pytest.mark.parametrize("layout", ["1", "tp2_sp", "pp2", *EXPERT_LAYOUTS])
def test_a_row_of_an_expert_is_of_the_sample_that_it_counts_for(layout: str, tmp_path: Path) -> None:
    save_tiny(CASE, tmp_path / CASE)
    world, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_rows_are_of_their_samples, world, tmp_path, fields, tmp_path)


def test_experts_alone_are_ranked_by_what_they_do_when_they_are_asked() -> None:
    one = torch.ones(4)
    tensors = {
        "l2_mean.hidden": one, "l2_mean.layers.0.experts": one, "l2_mean.layers.0.experts.0.mlp": one,
        "reap.layers.0.experts": 2 * one, "depth.bi": one,
    }  # fmt: skip
    scores = Scores(tensors, {"width": "l2_mean", "depth": "bi"})
    assert scores.width_metrics == ["l2_mean"]
    by_width, by_reap = scores.ranking(None, None), scores.ranking(None, None, ExpertMetric.reap)
    assert by_width.keys() == by_reap.keys()
    assert [name for name in by_width if not torch.equal(by_width[name], by_reap[name])] == ["layers.0.experts"]
    assert torch.equal(by_reap["layers.0.experts"], 2 * one)


def test_a_rank_of_experts_without_effect_is_refused() -> None:
    config = compose(["search.experts_by=reap", "score.width=[taylor]", "model.source=x", "run.dir=x"])
    dense, moe = (replace(TINY, num_experts=number, experts_per_token=min(1, number)) for number in (0, 2))
    no_experts, no_activations = search_problems(config, [dense])
    assert no_experts == f"search.experts_by=reap ranks experts, which {TINY.family} has none of; leave it out."
    assert no_activations == "search.experts_by=reap needs an activation metric in score.width; add l2_mean to it."
    assert search_problems(config, [moe]) == [no_activations]
