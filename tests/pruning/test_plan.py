"""Plans against a choice made with plain Python sorting, and by hand."""

import json
import random
from dataclasses import replace

import pytest
import torch

from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.errors import CheckpointError, ConfigError, NumericsError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.pruning.plan import Plan, make_plan
from compactlm_nemo.search.candidates import kept_importance, rank_candidates

TEACHER = Dims(
    family="llama", num_layers=5, hidden_size=16, ffn_hidden_size=24, num_heads=6, num_query_groups=2, head_dim=4,
    vocab_size=11, max_position_embeddings=32, norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
STUDENT = TEACHER.with_shape(layers=3, hidden=9, ffn=7, heads=4)


MIXED = replace(
    TEACHER,
    num_heads=12,
    num_query_groups=4,
    num_experts=6,
    experts_per_token=2,
    ffn_hidden_size=8,
    shared_expert_ffn=9,
)


def scores_of(dims: Dims, seed: int = 0) -> dict[str, torch.Tensor]:
    # Few distinct values, so that ties are common.
    draw = torch.Generator().manual_seed(seed)
    lengths = {"hidden": dims.hidden_size, "depth": dims.num_layers}
    for i in range(dims.num_layers):
        lengths |= {f"layers.{i}.mlp": dims.ffn_hidden_size, f"layers.{i}.heads": dims.num_heads}
        if dims.num_experts:
            lengths |= {f"layers.{i}.groups": dims.num_query_groups, f"layers.{i}.experts": dims.num_experts}
            lengths |= {f"layers.{i}.experts.{e}.mlp": dims.ffn_hidden_size for e in range(dims.num_experts)}
            lengths |= {f"layers.{i}.shared_expert.mlp": dims.shared_expert_ffn}
            del lengths[f"layers.{i}.mlp"]
    return {name: torch.randint(0, 4, (n,), generator=draw).double() for name, n in lengths.items()}


def naive_top(values: list[float], k: int, among: range | None = None) -> list[int]:
    indices = among if among is not None else range(len(values))
    return sorted(sorted(indices, key=lambda i: (-values[i], i))[:k])


@pytest.mark.parametrize("seed", range(5))
def test_plan_is_the_naive_choice(seed):
    scores = scores_of(TEACHER, seed)
    plain = {name: value.tolist() for name, value in scores.items()}
    plan = make_plan(TEACHER, STUDENT, scores)
    assert plan.layers == naive_top(plain["depth"], 3)
    assert plan.hidden.tolist() == naive_top(plain["hidden"], 9)
    assert list(plan.mlp) == list(plan.heads) == plan.layers
    for i in plan.layers:
        heads = plain[f"layers.{i}.heads"]
        assert plan.mlp[i].tolist() == naive_top(plain[f"layers.{i}.mlp"], 7)
        assert plan.heads[i].tolist() == naive_top(heads, 2, range(0, 3)) + naive_top(heads, 2, range(3, 6))
        assert plan.heads[i].dtype == plan.mlp[i].dtype == plan.hidden.dtype == torch.int64


def test_heads_are_chosen_inside_their_group():
    scores = scores_of(TEACHER) | {f"layers.{i}.heads": torch.tensor([9.0, 8, 7, 1, 3, 2]) for i in range(5)}
    plan = make_plan(TEACHER, replace(STUDENT, num_heads=2), scores)
    assert all(kept.tolist() == [0, 4] for kept in plan.heads.values())


def test_whole_groups_go_by_their_own_scores():
    scores = scores_of(TEACHER) | {f"layers.{i}.heads": torch.tensor([9.0, 8, 7, 1, 3, 2]) for i in range(5)}
    scores |= {f"layers.{i}.groups": torch.tensor([1.0, 2.0]) for i in range(5)}
    plan = make_plan(TEACHER, replace(STUDENT, num_heads=2, num_query_groups=1), scores)
    assert all(kept.tolist() == [4, 5] for kept in plan.heads.values())


def test_removed_heads_are_merged_into_the_last_kept_ones():
    """Of L = 5 heads K = 3 stay: the paper's pairs are (3, 4) and (2, 5), counted from 1, best first."""
    wide = replace(TEACHER, num_heads=10)
    score = torch.tensor([1.0, 5, 4, 2, 3, 9, 8, 7, 6, 5])  # best first: 1, 2, 4, 3, 0 and 5, 6, 7, 8, 9
    scores = scores_of(wide) | {f"layers.{i}.heads": score for i in range(5)}
    plan = make_plan(wide, replace(wide, num_heads=6), scores, merge_heads=True)
    assert plan.merge == {i: [(2, 0), (4, 3), (6, 9), (7, 8)] for i in range(5)}
    assert make_plan(wide, replace(wide, num_heads=6), scores).merge == {}
    assert make_plan(wide, wide, scores, merge_heads=True).merge == {}
    with pytest.raises(ConfigError, match="prune.heads=merge keeps 2 of 5 heads.*at least half"):
        make_plan(wide, replace(wide, num_heads=4), scores, merge_heads=True)


def random_cut(seed: int) -> Dims:
    """Any sizes that `MIXED` can be cut to."""
    draw = random.Random(seed)
    groups = draw.randint(1, 4)
    return MIXED.with_shape(
        layers=draw.randint(1, 5), hidden=draw.randint(1, 16), ffn=draw.randint(1, 8), groups=groups,
        heads=groups * draw.randint(1, 3), experts=draw.randint(2, 6), shared_expert_ffn=draw.randint(1, 9),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_groups_and_experts_are_the_naive_choice(seed):
    """Property-style over sizes and scores; after a round trip through JSON."""
    scores, student = scores_of(MIXED, seed), random_cut(seed)
    plain = {name: value.tolist() for name, value in scores.items()}
    plan = Plan.from_json(json.loads(json.dumps(make_plan(MIXED, student, scores).to_json())))
    assert list(plan.heads) == list(plan.experts) == list(plan.expert_mlp) == list(plan.shared_expert) == plan.layers
    for i in plan.layers:
        groups = naive_top(plain[f"layers.{i}.groups"], student.num_query_groups)
        each = student.num_heads // student.num_query_groups
        want = [naive_top(plain[f"layers.{i}.heads"], each, range(3 * g, 3 * g + 3)) for g in groups]
        assert plan.heads[i].tolist() == [head for heads in want for head in heads]
        experts = naive_top(plain[f"layers.{i}.experts"], student.num_experts)
        assert plan.experts[i].tolist() == experts
        neurons = {e: naive_top(plain[f"layers.{i}.experts.{e}.mlp"], student.ffn_hidden_size) for e in experts}
        assert {e: kept.tolist() for e, kept in plan.expert_mlp[i].items()} == neurons
        shared = naive_top(plain[f"layers.{i}.shared_expert.mlp"], student.shared_expert_ffn)
        assert plan.shared_expert[i].tolist() == shared
    assert {kept.dtype for experts in plan.expert_mlp.values() for kept in experts.values()} == {torch.int64}


@pytest.mark.parametrize("seed", range(4))
def test_kept_importance_with_experts_is_the_naive_sum(seed):
    scores, student = scores_of(MIXED, seed), random_cut(seed)
    plain = {name: value.tolist() for name, value in scores.items()}

    def share(name: str, kept: list[int]) -> float:
        return sum(plain[name][unit] for unit in kept) / sum(plain[name])

    def top(name: str, count: int) -> float:
        return share(name, naive_top(plain[name], count))

    every = Plan.from_json(make_plan(MIXED, replace(student, num_layers=5), scores).to_json())
    heads = [share(f"layers.{i}.heads", every.heads[i].tolist()) for i in range(5)]
    mlp = []
    for i in range(5):
        neurons = [top(f"layers.{i}.experts.{e}.mlp", student.ffn_hidden_size) for e in range(6)]
        neurons.append(top(f"layers.{i}.shared_expert.mlp", student.shared_expert_ffn))
        mlp.append(top(f"layers.{i}.experts", student.num_experts) * sum(neurons) / 7)
    want = top("hidden", student.hidden_size) * sum(heads) / 5 * sum(mlp) / 5 * top("depth", student.num_layers)
    assert kept_importance(MIXED, scores)(student) == pytest.approx(want, rel=1e-12)
    assert kept_importance(MIXED, scores)(MIXED) == 1
    ranked = rank_candidates(MIXED, [student, MIXED], scores, SearchConfig())
    assert [c.dims(MIXED) for c in ranked] == [MIXED, student]


NAN = torch.tensor([1.0, float("nan"), 2, 3])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers.1.experts": None}, ConfigError, "scores: layers.1.experts is missing"),
        ({"layers.4.experts.5.mlp": None}, ConfigError, "scores: layers.4.experts.5.mlp is missing"),
        ({"layers.0.shared_expert.mlp": None}, ConfigError, "scores: layers.0.shared_expert.mlp is missing"),
        ({"layers.1.groups": None}, ConfigError, "scores: layers.1.groups is missing"),
        ({"layers.1.groups": torch.ones(3)}, ConfigError, r"layers.1.groups has shape \[3\], the teacher needs \[4\]"),
        ({"layers.1.groups": NAN}, NumericsError, "layers.1.groups holds NaN"),
        ({"layers.0.experts": torch.ones(8)}, ConfigError, r"layers.0.experts has shape \[8\]"),
        ({"layers.0.experts.0.mlp": torch.ones(8) / 0}, NumericsError, "layers.0.experts.0.mlp holds NaN or infinity"),
    ],
)
def test_scores_of_groups_and_experts_are_checked(changes, error, message):
    scores = {name: x for name, x in (scores_of(MIXED) | changes).items() if x is not None}
    with pytest.raises(error, match=message):
        make_plan(MIXED, MIXED.with_shape(layers=5, groups=2, heads=6), scores)


def test_scores_of_groups_may_be_missing_where_none_is_cut():
    scores = {name: x for name, x in scores_of(MIXED).items() if not name.endswith("groups")}
    assert make_plan(MIXED, MIXED.with_shape(heads=8, experts=2), scores).heads[0].shape == (8,)


def test_experts_go_first_then_the_neurons_of_each():
    mixed = replace(TEACHER, num_experts=3, experts_per_token=1, ffn_hidden_size=4, shared_expert_ffn=5)
    scores = {name: x for name, x in scores_of(mixed).items() if not name.endswith("mlp")}
    for i in range(5):
        scores |= {f"layers.{i}.experts": torch.tensor([1.0, 3, 2]), f"layers.{i}.shared_expert.mlp": torch.arange(5.0)}
        scores |= {f"layers.{i}.experts.{e}.mlp": torch.tensor([0.0, 9, e, 2 - e]) for e in range(3)}
    student = replace(mixed, num_experts=2, ffn_hidden_size=2, shared_expert_ffn=1)
    plan = make_plan(mixed, student, scores)
    assert plan.mlp == {} and all(plan.experts[i].tolist() == [1, 2] for i in range(5))
    assert all(plan.shared_expert[i].tolist() == [4] for i in range(5))
    assert {e: kept.tolist() for e, kept in plan.expert_mlp[0].items()} == {1: [1, 2], 2: [1, 2]}
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).to_json() == plan.to_json()
    with pytest.raises(ConfigError, match="num_experts=1 must be at least the 2"):
        make_plan(replace(mixed, experts_per_token=2), replace(student, num_experts=1, experts_per_token=2), scores)


def test_nothing_cut_keeps_everything():
    plan = make_plan(TEACHER, TEACHER, scores_of(TEACHER))
    assert plan.layers == list(range(5)) and plan.hidden.tolist() == list(range(16))
    assert all(plan.heads[i].tolist() == list(range(6)) and plan.mlp[i].tolist() == list(range(24)) for i in range(5))


def test_what_is_said_of_a_layer_goes_with_the_layer():
    teacher = replace(TEACHER, no_rope_layers=[False, True, False, True, True])
    sizes = teacher.with_shape(layers=3, heads=4)
    assert sizes.no_rope_layers == [False, True, False]
    plan = replace(make_plan(TEACHER, TEACHER, scores_of(TEACHER)), layers=[0, 3, 4])
    student = plan.student(teacher, sizes)
    assert student == replace(sizes, no_rope_layers=[False, True, True]) and student.num_layers == 3
    assert teacher.keep_layers(list(range(5))) == teacher
    assert plan.student(TEACHER, TEACHER.with_shape(layers=3)).no_rope_layers is None


def test_norms_over_all_heads_forbid_to_cut_heads():
    normed = replace(TEACHER, qk_norm_over_heads=True)
    with pytest.raises(ConfigError, match="search.heads=4 and search.groups=2 must be the teacher's 6 and 2 for llama"):
        make_plan(normed, normed.with_shape(heads=4), scores_of(TEACHER))
    assert make_plan(normed, normed.with_shape(hidden=8, ffn=8, layers=2), scores_of(TEACHER)).hidden.shape == (8,)


def test_json_round_trip():
    plan = make_plan(TEACHER, STUDENT, scores_of(TEACHER))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.to_json() == plan.to_json() and again.layers == plan.layers
    assert torch.equal(again.hidden, plan.hidden) and again.hidden.dtype == torch.int64
    assert set(again.mlp) == set(plan.mlp) and all(torch.equal(again.heads[i], plan.heads[i]) for i in plan.layers)


@pytest.mark.parametrize("broken", [{}, {"layers": [0], "hidden": ["x"], "mlp": {}, "heads": {}}, {"layers": None}])
def test_a_broken_plan_is_refused(broken):
    with pytest.raises(CheckpointError, match="pruning plan"):
        Plan.from_json(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 17}, r"hidden_size=17 must be in \[1, 16\]"),
        ({"num_layers": 6}, r"num_layers=6 must be in \[1, 5\]"),
        ({"ffn_hidden_size": 0}, r"ffn_hidden_size=0 must be in \[1, 24\]"),
        ({"num_heads": 8}, r"num_heads=8 must be in \[1, 6\]"),
        ({"num_heads": 3}, "num_heads=3 must be a multiple of its 2 query groups"),
        ({"num_query_groups": 1}, "num_heads=4 in 1 query groups are more than the teacher's 3 heads a group"),
        ({"num_experts": 1}, r"num_experts=1 must be in \[1, 0\]"),
        ({"head_dim": 2, "vocab_size": 10}, "student head_dim, vocab_size must be the teacher's"),
    ],
)
def test_students_that_are_no_cut_of_the_teacher(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(TEACHER, replace(STUDENT, **changes), scores_of(TEACHER))


@pytest.mark.parametrize("name", ["hidden_size", "ffn_hidden_size", "num_heads", "num_layers"])
@pytest.mark.parametrize("factor", [0.5, 2])
def test_scores_of_another_model_are_refused(name, factor):
    other = replace(TEACHER, **{name: int(getattr(TEACHER, name) * factor)})
    with pytest.raises(ConfigError, match="scores: "):
        make_plan(TEACHER, STUDENT, scores_of(other))
