"""The predicted loss by hand, and eliminations of layers against the maps themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from compactlm_nemo.importance.names import heads_key, mlp_key
from compactlm_nemo.pruning.elimination import eliminate_layer, ranking
from compactlm_nemo.pruning.least_squares import output_error, refit
from compactlm_nemo.search.predicted_loss import predicted_loss
from tests.search.test_search import TINY

WIDE = replace(TINY, num_layers=3)  # hidden 4, MLP 6, 4 heads in 2 groups


def elimination() -> dict[str, torch.Tensor]:
    """Errors that tell what was removed: `layer + removed / 10` for neurons, a tenth of that for heads."""
    found = {"hidden.error": torch.tensor([0.0, 0.1, 0.2, 0.4, 1])}
    for i in range(3):
        found[f"layers.{i}.mlp.error"] = (i + torch.arange(7) / 10).double() * (torch.arange(7) > 0)
        found[f"layers.{i}.heads.error"] = (i + torch.arange(5) / 10).double() * (torch.arange(5) > 0) / 10
    return found


SCORES = {
    "depth": torch.tensor([3.0, 1, 2]),
    **{f"layers.{i}.groups": torch.tensor([3.0, 1]) for i in range(3)},
    **{f"layers.{i}.experts": torch.tensor([3.0, 1, 4]) for i in range(3)},
}


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({}, 0.0),
        ({"hidden": 2}, 6 * 0.2),
        ({"ffn": 4}, 3 * 0.2 + 1 * 1.2 + 2 * 2.2),
        ({"heads": 2}, (3 * 0.2 + 1 * 1.2 + 2 * 2.2) / 10),
        ({"layers": 2}, 1.0),
        ({"layers": 1, "hidden": 3, "ffn": 5}, 3 * 0.1 + 3 * 0.1 + 3),
        ({"groups": 1, "heads": 2}, 6 * 0.25),  # the group that stays keeps its heads
        ({"groups": 1, "heads": 1}, 6 * 0.25 + (3 * 0.2 + 1 * 1.2 + 2 * 2.2) / 10),
    ],
)
def test_predicted_loss_by_hand(sizes, want):
    student = WIDE.with_shape(**sizes)
    assert predicted_loss(WIDE, SCORES, elimination())(student) == pytest.approx(want, rel=1e-6)


def test_a_removed_block_costs_its_own_score():
    nan = math.nan
    blocks = torch.tensor([[3.0, 9, nan], [1, 0.5, nan], [2, nan, nan]])
    loss = predicted_loss(WIDE, SCORES | {"depth": blocks}, elimination())(WIDE.with_shape(layers=1, ffn=4))
    assert loss == pytest.approx(0.5 + 3 * 0.2)
    unknown = torch.tensor([[nan, 9, nan], [nan, 0.5, nan], [nan, nan, nan]])
    loss = predicted_loss(WIDE, SCORES | {"depth": unknown}, elimination())(WIDE.with_shape(layers=1, ffn=4))
    assert loss == pytest.approx(0.5 + 0.2 / 3), "without scores of single layers all are worth the same"


def test_experts_lose_the_share_of_their_scores():
    mixed = replace(WIDE, num_experts=3, experts_per_token=1, shared_expert_ffn=2)
    scores = SCORES | {
        f"layers.{i}.experts.{e}.mlp": torch.tensor([1.0, 2, 1, 0, 0, 0]) for i in range(3) for e in range(3)
    }
    scores |= {f"layers.{i}.shared_expert.mlp": torch.tensor([3.0, 1]) for i in range(3)}
    loss = predicted_loss(mixed, scores, elimination())
    assert loss(mixed) == 0
    assert loss(mixed.with_shape(experts=2)) == pytest.approx(6 * 1 / 8)
    # Of the neurons of three experts half the mass goes each, of the shared expert a quarter.
    assert loss(mixed.with_shape(ffn=1, shared_expert_ffn=1)) == pytest.approx(6 * (3 * 0.5 + 0.25) / 4)


def test_an_elimination_costs_what_refitting_leaves():
    draw = torch.Generator().manual_seed(0)
    x = {name: torch.randn(50, width, generator=draw).double() for name, width in ((heads_key(1), 8), (mlp_key(1), 6))}
    shapes = {"self_attention.linear_proj": (4, 8), "mlp.linear_fc2": (4, 6)}
    weights = {f"decoder.layers.1.{name}.weight": torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    found = eliminate_layer(1, WIDE, weights.__getitem__, lambda name: x[name].T @ x[name], 1e-9)
    assert len(found["layers.1.heads.order"]) == 4 and len(found["layers.1.mlp.order"]) == 6
    for removed in range(1, 6):
        kept = found["layers.1.mlp.order"][removed:].sort().values
        weight, moment = weights["decoder.layers.1.mlp.linear_fc2.weight"], x[mlp_key(1)].T @ x[mlp_key(1)]
        want = output_error(weight, moment, kept, refit(weight, moment, kept, 1e-9))
        assert float(found["layers.1.mlp.error"][removed]) == pytest.approx(want, rel=1e-5)
    assert float(found["layers.1.mlp.error"][-1]) == pytest.approx(1, rel=1e-5)
    # Of heads one of each group goes in turn.
    assert sorted((found["layers.1.heads.order"][:2] // 2).tolist()) == [0, 1]


def test_order_of_removal_takes_the_place_of_scores():
    scores = {"layers.0.mlp": torch.tensor([9.0, 8, 7]), "layers.0.heads": torch.tensor([1.0, 2])}
    orders = {"layers.0.mlp.order": torch.tensor([1, 2, 0]), "layers.0.heads.order": torch.tensor([1, 0])}
    orders["layers.0.mlp.error"] = torch.zeros(4)
    assert ranking(orders, scores, ["mlp"])["layers.0.mlp"].tolist() == [2, 0, 1]
    assert ranking(orders, scores, ["mlp"])["layers.0.heads"].tolist() == [1, 2]
    assert ranking(orders, scores, ["mlp", "heads"])["layers.0.heads"].tolist() == [1, 0]
