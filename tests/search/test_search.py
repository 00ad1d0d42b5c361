"""The space against the papers' tables, budgets, and ranks by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch

from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.errors import ConfigError, NumericsError
from compactlm_nemo.importance.selection import keep_heads, keep_layers, top_units
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.search import cost
from compactlm_nemo.search.candidates import candidates_json, depth_share, rank_candidates
from compactlm_nemo.search.space import enumerate_space
from tests.support.shapes import NEMOTRON_15B, TINY
from tests.support.tiny_models import tiny_config


def _space(hidden, heads, **budget):
    return SearchConfig(layers=[29, 30, 31, 32], heads=heads, ffn_multiples=[2.5, 3, 3.5, 4], hidden=hidden, **budget)


def test_the_4b_space_has_the_papers_18_candidates():
    cfg = _space([2560, 3072, 3584, 4096, 4608], [24, 32, 48], params=4.0e9, band=0.05)
    found = enumerate_space(NEMOTRON_15B, cfg)
    assert len(found) == 18
    assert all(3.8e9 <= cost.num_params(dims) <= 4.2e9 for dims in found)
    assert NEMOTRON_15B.with_shape(layers=32, hidden=3072, ffn=9216, heads=24) in found  # Minitron 4B


TABLE_19 = """32/32/12800/5120 32/32/13824/4608 32/48/11520/4608 32/48/16384/4096 31/32/12800/5120 31/32/16128/4608
31/48/13824/4608 31/48/16384/4096 30/32/12800/5120 30/32/16128/4608 30/48/13824/4608 30/48/16384/4096
29/32/12800/5120 29/32/16128/4608 29/48/13824/4608"""


def test_the_8b_space_has_the_papers_15_candidates():
    # The band's ends are the smallest and largest candidate rounded to a million, so half a million is added on each
    # side: with norm biases the largest has 8.49413e9 parameters.
    low, high = 7.871e9 - 5e5, 8.494e9 + 5e5
    cfg = _space(
        [4096, 4608, 5120, 5632, 6144], [32, 48], params=(low + high) / 2, band=(high - low) / (high + low)
    )  # fmt: skip
    found = enumerate_space(NEMOTRON_15B, cfg)
    names = [f"{d.num_layers}/{d.num_heads}/{d.ffn_hidden_size}/{d.hidden_size}" for d in found]
    assert len(names) == 15 and set(names) == set(TABLE_19.split())


def test_empty_axes_keep_the_teacher_and_order_is_fixed():
    assert enumerate_space(TINY, SearchConfig()) == [TINY]
    alone = replace(TINY, num_query_groups=4)  # every head has keys and values of its own
    assert [(d.num_heads, d.num_query_groups) for d in enumerate_space(alone, SearchConfig(heads=[2, 3]))] == [
        (3, 3),
        (2, 2),
    ]
    found = enumerate_space(TINY, SearchConfig(layers=[1, 2], heads=[2, 4, 2], ffn=[3]))
    assert [(d.num_layers, d.num_heads) for d in found] == [(2, 4), (2, 2), (1, 4), (1, 2)]
    assert {(d.ffn_hidden_size, d.hidden_size) for d in found} == {(3, 4)}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (SearchConfig(hidden=[5]), r"search.hidden=5 must be in \[1, 4\]"),
        (SearchConfig(layers=[0]), r"search.layers=0 must be in \[1, 2\]"),
        (
            SearchConfig(heads=[3]),
            "search.heads=3 must be a multiple of 2 query groups with at most 2 heads each; try 2",
        ),
        (SearchConfig(heads=[4], groups=[1]), "search.heads=4 must be a multiple of 1 query groups.*try 2"),
        (SearchConfig(groups=[1]), r"search.groups=\[1\] fits none of \[4\] heads.*multiples of the groups, 2 at most"),
        (SearchConfig(ffn_multiples=[1.3]), "search.ffn_multiples=1.3 times hidden 4 is 5.2, must be whole"),
        (SearchConfig(ffn_multiples=[2]), r"times hidden 4 is 8, must be in \[1, 6\]"),
        (SearchConfig(hidden=[5], layers=[3]), "(?s)2 problems:\n- search.layers=3.*\n- search.hidden=5"),
    ],
)
def test_axes_the_teacher_cannot_be_cut_to(cfg, message):
    with pytest.raises(ConfigError, match=message):
        enumerate_space(TINY, cfg)


def test_a_multiple_that_binary_cannot_hold_is_whole():
    assert 1.1 * 50 != 55  # else this tests nothing
    teacher = replace(TINY, hidden_size=50, ffn_hidden_size=100)
    assert enumerate_space(teacher, SearchConfig(ffn_multiples=[1.1]))[0].ffn_hidden_size == 55


def test_values_by_rule():
    teacher = replace(NEMOTRON_15B, tied_embeddings=True)

    def values(axis, cfg, tp=1):
        return sorted({getattr(dims, axis) for dims in enumerate_space(teacher, cfg, tp)})

    assert values("hidden_size", SearchConfig(multiples={"hidden": 1000})) == [4000, 5000, 6000]
    assert values("num_layers", SearchConfig(divisors=["layers"], smallest=0.1)) == [4, 8, 16, 32]
    # Heads must be a multiple of the 8 groups; 16 ranks can split multiples of 16.
    assert values("num_heads", SearchConfig(multiples={"heads": 1})) == [24, 32, 40, 48]
    assert values("num_heads", SearchConfig(multiples={"heads": 4}), tp=16) == [32, 48]
    experts = replace(TINY, num_experts=12, experts_per_token=5)
    found = enumerate_space(experts, SearchConfig(divisors=["experts"], multiples={"experts": 2}, smallest=0.25))
    assert [dims.num_experts for dims in found] == [12, 6]  # not 4, as a token is sent to 5
    found = enumerate_space(teacher, SearchConfig(multiples={"groups": 1}, heads=[24, 36, 48]))
    assert {(d.num_heads, d.num_query_groups) for d in found} == {(24, 4), (24, 6), (24, 8), (36, 6), (48, 8)}


def test_budgets_hold_together():
    space = SearchConfig(layers=[1, 2], ffn=[1, 3, 6], heads=[2, 4])
    every = enumerate_space(TINY, space)
    assert len(every) == 12
    limits = {
        "flops": lambda d: cost.flops_per_token_forward(d, 64),
        "memory_bytes": lambda d: cost.weight_bytes(d, 4) + 3 * 64 * cost.kv_cache_bytes_per_token(d, 4),
    }
    for name, of in limits.items():
        middle = sorted(map(of, every))[5]
        cfg = replace(space, context=64, batch=3, bytes_per_value=4, **{name: float(middle)})
        assert enumerate_space(TINY, cfg) == [d for d in every if of(d) <= middle]
        target = cost.num_params(every[-3])
        both = replace(cfg, active_params=float(target), band=0.3)
        assert enumerate_space(TINY, both) == [
            d for d in every if of(d) <= middle and abs(cost.num_params(d) / target - 1) <= 0.3
        ]
        with pytest.raises(ConfigError, match=f"search.{name}=1 is met by none of 12.*{min(map(of, every))} {name}"):
            enumerate_space(TINY, replace(cfg, **{name: 1.0}))
    window = replace(TINY, window=16)  # of which keys and values are kept
    least = cost.weight_bytes(window, 4) + 3 * 16 * cost.kv_cache_bytes_per_token(window, 4)
    cfg = SearchConfig(context=64, batch=3, bytes_per_value=4)
    assert enumerate_space(window, replace(cfg, memory_bytes=float(least))) == [window]
    with pytest.raises(ConfigError, match="search.memory_bytes"):
        enumerate_space(window, replace(cfg, memory_bytes=least - 1.0))
    body = cost.num_params(TINY) - cost.embedding_params(TINY)
    assert enumerate_space(TINY, replace(space, non_embedding_params=float(body), band=0.0)) == [TINY]


def test_an_infeasible_budget_names_the_nearest_count():
    one, two = (cost.num_params(replace(TINY, num_layers=n)) for n in (1, 2))
    with pytest.raises(ConfigError, match=f"none of 2 architectures.*nearest has {two} parameters"):
        enumerate_space(TINY, SearchConfig(layers=[1, 2], params=10.0 * two))
    with pytest.raises(ConfigError, match=f"nearest has {one} parameters"):
        enumerate_space(TINY, SearchConfig(layers=[1, 2], params=one / 2))


def test_of_several_budgets_the_impossible_one_is_named():
    one, two = (TINY.with_shape(layers=n) for n in (1, 2))
    flops = [cost.flops_per_token_forward(dims, 8) for dims in (one, two)]
    space = SearchConfig(layers=[1, 2], context=8, band=0.0)
    both = replace(space, params=float(cost.num_params(two)), flops=float(flops[1] - 1))
    with pytest.raises(
        ConfigError, match=r"params=\d+ within search.band=0 and search.flops=\d+ is more than any of 2"
    ):
        enumerate_space(TINY, both)
    with pytest.raises(ConfigError) as caught:
        enumerate_space(TINY, replace(both, flops=flops[0] / 2))
    assert str(caught.value) == (
        f"search.flops={flops[0] / 2:g} is met by none of 2 architectures; the nearest has {cost.num_params(one)} "
        f"parameters, {flops[0]} flops (1 layers, hidden 4, heads 4/2, MLP 6): aim there or widen the axes."
    )


def _scores():
    return {
        "hidden": torch.tensor([4.0, 1.0, 3.0, 2.0]),
        "layers.0.mlp": torch.tensor([1.0, 1, 1, 1, 1, 5]),
        "layers.1.mlp": torch.tensor([2.0, 0, 0, 0, 0, 0]),
        "layers.0.heads": torch.tensor([4.0, 3, 2, 1]),
        "layers.1.heads": torch.tensor([1.0, 1, 1, 1]),
        "depth": torch.tensor([0.125, 0.375]),
    }


def test_ranks_by_hand():
    # hidden 2 of 4: 7/10. ffn 1 of 6: (5/10 + 2/2) / 2. Heads, one of each pair: ((4+2)/10 + 2/4) / 2. Depth: 3/4.
    cuts = [
        (TINY.with_shape(layers=2, hidden=4, ffn=1, heads=4), 0.75),
        (TINY.with_shape(layers=2, hidden=4, ffn=6, heads=2), 0.55),
        (TINY.with_shape(layers=1, hidden=2, ffn=1, heads=2), 0.7 * 0.75 * 0.55 * 0.75),
        (TINY, 1.0),
    ]
    ranked = rank_candidates(TINY, [dims for dims, _ in cuts], _scores(), SearchConfig())
    want = sorted(cuts, key=lambda cut: -cut[1])
    assert [c.dims(TINY) for c in ranked] == [dims for dims, _ in want]
    assert [c.kept_importance for c in ranked] == pytest.approx([kept for _, kept in want], rel=1e-12)
    assert [c.params for c in ranked] == [cost.num_params(dims) for dims, _ in want]
    assert [c.flops_per_token for c in ranked] == [cost.flops_per_token_forward(dims, 2048) for dims, _ in want]
    assert json.loads(candidates_json(ranked)) == [
        {name: value for name, value in vars(c).items() if value is not None} for c in ranked
    ]


def test_a_candidate_is_its_architecture():
    teacher = replace(TINY, num_experts=4, experts_per_token=2, shared_expert_ffn=5)
    student = teacher.with_shape(layers=1, hidden=3, ffn=4, heads=1, groups=1, experts=3, shared_expert_ffn=2)
    names = ["heads", "groups", "experts", *(f"experts.{e}.mlp" for e in range(4)), "shared_expert.mlp"]
    sizes = [4, 2, 4, 6, 6, 6, 6, 5]
    scores = {f"layers.{i}.{n}": torch.ones(size) for i in (0, 1) for n, size in zip(names, sizes, strict=True)}
    scores |= {"hidden": torch.ones(4), "depth": torch.ones(2)}
    [candidate] = rank_candidates(teacher, [student], scores, SearchConfig(batch=2, context=8, bytes_per_value=4))
    assert candidate.dims(teacher) == student
    assert candidate.active_params == cost.active_params(student) < candidate.params == cost.num_params(student)
    assert candidate.memory_bytes == 4 * candidate.params + 16 * cost.kv_cache_bytes_per_token(student, 4)


def test_equal_importance_puts_the_smaller_model_first():
    scores = _scores() | {"layers.0.mlp": torch.tensor([9.0, 0, 0, 0, 0, 0])}
    cuts = [TINY.with_shape(layers=2, hidden=4, ffn=n, heads=4) for n in (4, 2, 3)]
    assert [c.ffn for c in rank_candidates(TINY, cuts, scores, SearchConfig())] == [2, 3, 4]


def test_a_layer_without_any_score_loses_nothing():
    cut = TINY.with_shape(layers=2, hidden=4, ffn=1, heads=4)
    [ranked] = rank_candidates(TINY, [cut], _scores() | {"layers.1.mlp": torch.zeros(6)}, SearchConfig())
    assert ranked.kept_importance == 0.75  # (5/10 + 1) / 2


def test_units_that_stay():
    assert top_units(torch.tensor([1.0, 5, 5, 5, 0]), 2).tolist() == [1, 2]
    assert top_units(torch.ones(500), 3).tolist() == [0, 1, 2]
    # The two best heads are both in group 0, yet each group keeps one.
    scores = _scores() | {"layers.0.heads": torch.tensor([9.0, 8, 1, 2]), "layers.0.groups": torch.tensor([1.0, 3])}
    assert keep_heads(0, TINY, TINY.with_shape(heads=2), scores).tolist() == [0, 3]
    # Of the better group one head, whatever the heads of the other score.
    assert keep_heads(0, TINY, TINY.with_shape(heads=1, groups=1), scores).tolist() == [3]
    assert keep_heads(0, TINY, TINY.with_shape(heads=2, groups=1), scores).tolist() == [2, 3]
    with pytest.raises(ConfigError, match="layers.1.groups is missing"):
        keep_heads(1, TINY, TINY.with_shape(heads=2, groups=1), scores)


def test_blocks_of_layers():
    nan = float("nan")
    # Removing two layers costs least from layer 1 on; one layer was not measured.
    blocks = torch.tensor([[nan, 0.5, 3], [nan, 0.25, nan], [nan, nan, nan]])
    assert keep_layers(blocks, 1).tolist() == [0] and keep_layers(blocks, 3).tolist() == [0, 1, 2]
    assert depth_share(blocks, 1) == pytest.approx(math.exp(-0.25)) and depth_share(blocks, 3) == 1
    with pytest.raises(ConfigError, match=r"no blocks of 1 layers.*search.layers=2.*add 1 to score.block_lengths"):
        keep_layers(blocks, 2)
    assert keep_layers(torch.tensor([1.0, 3, 2]), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(5)}, ConfigError, r"hidden has shape \[5\], the teacher needs \[4\]"),
        ({"layers.2.mlp": torch.ones(6)}, ConfigError, "beyond the teacher's 2 layers"),
        ({"layers.1.heads": torch.tensor([1.0, 2, 3, float("nan")])}, NumericsError, "layers.1.heads holds NaN"),
    ],
)
def test_scores_of_another_model_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        rank_candidates(TINY, [TINY], _scores() | change, SearchConfig())
    with pytest.raises(ConfigError, match="depth is missing"):
        rank_candidates(TINY, [TINY], {k: v for k, v in _scores().items() if k != "depth"}, SearchConfig())


def test_budgets_count_the_layers_that_stay() -> None:
    """Of a DeepSeek the first layers are dense and smaller: without one of them there is more to count."""
    teacher = dims_of(tiny_config("deepseek_v3_tied_plain"))
    [first] = enumerate_space(teacher, SearchConfig(layers=[2]))
    [last] = enumerate_space(teacher, SearchConfig(layers=[2]), layers_of=lambda count: [0, 3])
    assert (first.dense_layers, last.dense_layers) == ([True, True], [True, False])
    assert cost.num_params(last) > cost.num_params(first)
