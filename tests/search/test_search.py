"""Costs against transformers' models and the papers' counts, the space against the papers' tables, ranks by hand."""

import math
import random
from dataclasses import replace
from math import prod

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from compactlm_nemo.config.schema import ParallelConfig, SearchConfig
from compactlm_nemo.errors import ConfigError, NumericsError
from compactlm_nemo.models.build import tp_share
from compactlm_nemo.models.dims import Dims, split_layers
from compactlm_nemo.models.families import dims_of, parameter_shapes, resized
from compactlm_nemo.search import cost
from compactlm_nemo.search.select import depth_share, keep_heads, keep_layers, rank_candidates, top_units
from compactlm_nemo.search.space import enumerate_space

NEMOTRON_15B = Dims(
    family="nemotron", num_layers=32, hidden_size=6144, ffn_hidden_size=24576, num_heads=48, num_query_groups=8,
    head_dim=128, vocab_size=256000, max_position_embeddings=4096, norm_eps=1e-5, rope_theta=10000.0,
    gated_mlp=False, layer_norm_1p=True,
)  # fmt: skip
TINY = replace(
    NEMOTRON_15B, family="llama", num_layers=2, hidden_size=4, ffn_hidden_size=6, num_heads=4, num_query_groups=2,
    head_dim=2, vocab_size=10, gated_mlp=True, layer_norm_1p=False, tied_embeddings=True,
)  # fmt: skip
SIZES = dict(
    vocab_size=70, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)
HF = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama_bias": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**{**SIZES, "head_dim": 8})),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "nemotron": (NemotronForCausalLM, NemotronConfig(**SIZES)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=40)),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, **EXPERTS, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", HF)
def test_num_params_is_what_transformers_builds(name):
    kind, config = HF[name]
    # transformers' Nemotron norms have biases and Llama's MLP bias follows its own flag: nothing here is assumed.
    dims = dims_of(config)
    with torch.device("meta"):
        model = kind(config)
    assert cost.num_params(dims) == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes(dims, 2) == 2 * sum(p.numel() for p in model.parameters())
    tables = {id(p): p.numel() for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    assert cost.embedding_params(dims) == sum(tables.values())


@pytest.mark.parametrize(
    ("layers", "hidden", "ffn", "heads", "groups", "billions"),
    [
        (32, 6144, 24576, 48, 8, "15.63"),
        (32, 4096, 16384, 32, 32, "8.54"),  # Nemotron-3 8B, multi-head: one group a head
        (32, 4096, 16384, 48, 8, "8.27"),
        (32, 3072, 9216, 24, 8, "4.19"),
    ],
)
def test_num_params_of_the_published_models(layers, hidden, ffn, heads, groups, billions):
    teacher = replace(NEMOTRON_15B, num_query_groups=groups)
    dims = teacher.with_shape(layers=layers, hidden=hidden, ffn=ffn, heads=heads)
    assert f"{cost.num_params(dims) / 1e9:.2f}" == billions


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 4, 1), (1, 1, 4), (2, 2, 2)])
def test_params_per_rank_are_the_shares_the_model_is_filled_with(name, tp, pp, ep):
    dims, multiple = dims_of(HF[name][1]), 16
    if ep > 1 and not dims.num_experts:
        pytest.skip("a dense model has no experts to spread")
    padded = dims.padded_vocab(tp, multiple)
    layout = ParallelConfig(tp=tp, pp=pp, ep=ep)
    chunks = [dims.num_layers // pp] * pp
    held = cost.params_per_rank(dims, layout=layout, chunk_layers=chunks, vocab_multiple=multiple)
    for stage in range(pp):
        want = 0
        for parameter, shape in parameter_shapes(dims).items():
            full = torch.empty(shape, device="meta")
            share = tp_share(parameter, full, rank=0, size=tp, gated=dims.gated_mlp, padded_vocab=padded)
            if parameter.startswith("decoder.layers."):
                here = int(parameter.split(".")[2]) // (dims.num_layers // pp) == stage
                if ".local_experts." in parameter:
                    here = here and int(parameter.split(".")[6]) < dims.num_experts // ep
            elif parameter.startswith("embedding."):
                here = stage == 0 or (dims.tied_embeddings and stage == pp - 1)
            else:
                here = stage == pp - 1
            want += prod(share.shape) * here
        assert held[stage] == want


def test_params_per_rank_refuses_what_does_not_divide():
    with pytest.raises(ConfigError, match="parallel.tp=4 must divide num_query_groups=2.*ffn_hidden_size=6"):
        cost.params_per_rank(TINY, layout=ParallelConfig(tp=4), chunk_layers=[2], vocab_multiple=1)
    odd = replace(TINY, num_experts=3, experts_per_token=2, shared_expert_ffn=5)
    with pytest.raises(
        ConfigError, match="parallel.tp=2 must divide shared_expert_ffn=5; parallel.ep=2 must divide nu"
    ):
        cost.params_per_rank(odd, layout=ParallelConfig(tp=2, ep=2), chunk_layers=[2], vocab_multiple=1)


@pytest.mark.parametrize(
    ("layers", "split", "want"),
    [(8, [1, 3], [2, 6]), (4, [1, 3], [1, 3]), (23, [], [12, 11]), (23, [1, 3], [6, 17]), (3, [9, 1], [2, 1])],
)
def test_layers_are_split_in_proportion(layers, split, want):
    assert split_layers(layers, ParallelConfig(pp=2, pp_split=split)) == want


def test_layers_of_virtual_stages():
    assert split_layers(10, ParallelConfig(pp=2, virtual_stages=2)) == [3, 3, 2, 2]
    with pytest.raises(ConfigError, match="cannot split 3 layers"):
        split_layers(3, ParallelConfig(pp=2, virtual_stages=2))


def test_flops_and_cache_by_hand():
    # A layer: qkv 16x4, proj 4x8, fc1 12x4, fc2 4x6 = 168 weights; output layer 10x4.
    linear = 2 * (2 * 168 + 40)
    # Queries at positions 1..4 read 1+2+3+4 = 10 keys, or 1+2+2+2 = 7 in a window of 2; 4 heads of 2, two matmuls.
    assert cost.flops_per_token_forward(TINY, 4) == linear + 2 * 4 * 4 * 2 * 10 // 4
    assert cost.flops_per_token_forward(replace(TINY, window=2), 4) == linear + 2 * 4 * 4 * 2 * 7 // 4
    biased = replace(TINY, qkv_bias=True, proj_bias=True, mlp_bias=True, tied_embeddings=False)
    assert cost.flops_per_token_forward(biased, 1) == linear + 2 * 4 * 4 * 2
    assert cost.kv_cache_bytes_per_token(TINY, 2) == 2 * 2 * 2 * 2 * 2
    # Llama 3.1 8B in bf16: 128 KiB a token is the commonly quoted figure.
    assert cost.kv_cache_bytes_per_token(replace(TINY, num_layers=32, num_query_groups=8, head_dim=128), 2) == 2**17


def test_experts_by_hand():
    # Of 168 weights a layer, 96 are attention's. Two of three experts of 3x6x4 = 72, the shared one of 3x5x4 = 60 with
    # its gate of 4, and a router of 3x4.
    dims = replace(TINY, num_experts=3, experts_per_token=2, shared_expert_ffn=5)
    layer = 96 + 2 * 72 + 60 + 4 + 12
    assert cost.flops_per_token_forward(dims, 1) == 2 * (2 * layer + 40) + 2 * 4 * 4 * 2
    norms = 2 * 2 * 4 + 4
    assert cost.active_params(dims) == 2 * layer + 40 + norms
    assert cost.num_params(dims) == 2 * (layer + 72) + 40 + norms
    assert cost.active_params(TINY) == cost.num_params(TINY)


QWEN3_30B_A3B = dict(
    num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=151936,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config", "total", "active"),
    [
        ("mixtral", {}, 46.7, 12.9),  # Mixtral 8x7B, arXiv 2401.04088
        ("qwen3_moe", QWEN3_30B_A3B, 30.5, 3.3),  # its model card; 3.35 exactly
        ("qwen2_moe", {}, 14.3, 2.7),  # Qwen1.5-MoE-A2.7B, its model card
    ],
)
def test_active_params_of_the_published_models(kind, config, total, active):
    dims = dims_of(AutoConfig.for_model(kind, **config))
    assert cost.num_params(dims) / 1e9 == pytest.approx(total, abs=0.06)
    assert cost.active_params(dims) / 1e9 == pytest.approx(active, abs=0.06)


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
    body = cost.num_params(TINY) - cost.embedding_params(TINY)
    assert enumerate_space(TINY, replace(space, non_embedding_params=float(body), band=0.0)) == [TINY]


@pytest.mark.parametrize("name", HF)
def test_counts_of_random_shapes_are_those_of_the_built_model(name):
    """Parameters from transformers' modules; FLOPs of linear layers and cache from their shapes."""
    config = HF[name][1]
    teacher, draw = dims_of(config), random.Random(name)
    for _ in range(8):
        groups = draw.choice([1, 2])
        heads = groups * draw.randint(1, 3)
        experts = draw.randint(max(2, teacher.experts_per_token), teacher.num_experts) if teacher.num_experts else 0
        dims = teacher.with_shape(
            layers=draw.randint(1, 4), hidden=heads if name == "llama_bias" else draw.randint(1, 48),
            ffn=draw.randint(1, 80), groups=groups, heads=heads, experts=experts,
            shared_expert_ffn=draw.randint(1, 40) if teacher.shared_expert_ffn else 0,
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(resized(config, dims))
        assert replace(dims_of(model.config), family=dims.family) == dims
        total = sum(p.numel() for p in model.parameters())
        assert cost.num_params(dims) == total
        idle = sum(
            p.numel() * (experts - teacher.experts_per_token) // experts
            for n, p in model.named_parameters()
            if ".experts." in n
        )
        assert cost.active_params(dims) == total - idle
        body = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "lm_head" not in n]
        linear = sum(p.numel() for _, p in body) - idle + dims.vocab_size * dims.hidden_size
        one_key = 4 * dims.num_heads * dims.head_dim * dims.num_layers  # a sequence of one token reads one key
        assert cost.flops_per_token_forward(dims, 1) == 2 * linear + one_key
        kv = sum(p.shape[0] for n, p in model.named_parameters() if n.endswith(("k_proj.weight", "v_proj.weight")))
        assert cost.kv_cache_bytes_per_token(dims, 2) == 2 * kv
        assert cost.memory_bytes(dims, 100, 2) == 2 * total + 200 * kv


def test_an_infeasible_budget_names_the_nearest_count():
    one, two = (cost.num_params(replace(TINY, num_layers=n)) for n in (1, 2))
    with pytest.raises(ConfigError, match=f"none of 2 architectures.*nearest has {two} parameters"):
        enumerate_space(TINY, SearchConfig(layers=[1, 2], params=10.0 * two))
    with pytest.raises(ConfigError, match=f"nearest has {one} parameters"):
        enumerate_space(TINY, SearchConfig(layers=[1, 2], params=one / 2))


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
    ranked = rank_candidates(TINY, [dims for dims, _ in cuts], _scores())
    want = sorted(cuts, key=lambda cut: -cut[1])
    assert [c.dims(TINY) for c in ranked] == [dims for dims, _ in want]
    assert [c.kept_importance for c in ranked] == pytest.approx([kept for _, kept in want], rel=1e-12)
    assert [c.params for c in ranked] == [cost.num_params(dims) for dims, _ in want]


def test_equal_importance_puts_the_smaller_model_first():
    scores = _scores() | {"layers.0.mlp": torch.tensor([9.0, 0, 0, 0, 0, 0])}
    cuts = [TINY.with_shape(layers=2, hidden=4, ffn=n, heads=4) for n in (4, 2, 3)]
    assert [c.ffn for c in rank_candidates(TINY, cuts, scores)] == [2, 3, 4]


def test_a_layer_without_any_score_loses_nothing():
    cut = TINY.with_shape(layers=2, hidden=4, ffn=1, heads=4)
    [ranked] = rank_candidates(TINY, [cut], _scores() | {"layers.1.mlp": torch.zeros(6)})
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
        rank_candidates(TINY, [TINY], _scores() | change)
    with pytest.raises(ConfigError, match="depth is missing"):
        rank_candidates(TINY, [TINY], {k: v for k, v in _scores().items() if k != "depth"})
