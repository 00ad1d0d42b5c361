"""Parameters, bytes and FLOPs against transformers' models, Megatron's and the papers' counts."""

import random
from dataclasses import replace
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
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

from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.build import build_model, tp_share
from compactlm_nemo.models.families import dims_of, resized
from compactlm_nemo.models.layout import split_layers
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.search import cost
from tests.support.meshes import mesh_of
from tests.support.ranks import run_ranks
from tests.support.shapes import NEMOTRON_15B, TINY
from tests.support.tiny_models import CASES, EAGER, LATENT_CASES, tiny_config

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
    "gpt_oss": (GptOssForCausalLM, GptOssConfig(**SIZES, num_local_experts=8, num_experts_per_tok=3)),
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
    with pytest.raises(ConfigError, match="parallel.tp=4 must divide ffn_hidden_size=6.*num_query_groups=2"):
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
    # Of its two layers one is local; it keeps 2 tokens of 5, the other all, so 3 in the mean.
    local = replace(TINY, window=2, local_layers=[True, False])
    assert cost.flops_per_token_forward(local, 4) == linear + 4 * 4 * 2 * (7 + 10) // 4
    assert cost.cached_tokens(local, 5) == (2 + 5) // 2 and cost.cached_tokens(replace(TINY, window=2), 5) == 2
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
        # arXiv 2508.10925, table 1; of the two tables it counts the output layer alone as active.
        ("gpt_oss", {}, 116.83, 5.13 + 0.58),
        ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 20.91, 3.61 + 0.58),
    ],
)
def test_active_params_of_the_published_models(kind, config, total, active):
    dims = dims_of(AutoConfig.for_model(kind, **config))
    assert cost.num_params(dims) / 1e9 == pytest.approx(total, abs=0.06)
    assert cost.active_params(dims) / 1e9 == pytest.approx(active, abs=0.06)


def random_shape(teacher, draw):
    """Any sizes the family can have; some are tied to each other (`models.limits`)."""
    groups = draw.choice([1, 2])
    heads = groups * draw.randint(1, 3)
    tied = teacher.family in ("gemma3_text", "deepseek_v2") or (
        teacher.family == "llama" and (teacher.qkv_bias or teacher.mlp_bias)
    )
    width = teacher.head_dim if (teacher.rope_scaling or {}).get("rope_type") == "longrope" else draw.randint(1, 9)
    if teacher.kv_lora_rank:
        ffn = draw.randint(1, 30)
        return teacher.with_shape(
            layers=draw.randint(1, 4), hidden=heads * width if tied else draw.randint(1, 48), ffn=ffn, heads=heads,
            groups=heads, experts=draw.choice([6, 8]), shared_expert_ffn=ffn * draw.randint(1, 3),
        )  # fmt: skip
    return teacher.with_shape(
        layers=draw.randint(1, 4),
        hidden=heads * width if tied or teacher.family == "phi3" else draw.randint(1, 48),
        ffn=draw.randint(1, 80), groups=groups, heads=heads,
        experts=draw.randint(max(2, teacher.experts_per_token), teacher.num_experts) if teacher.num_experts else 0,
        shared_expert_ffn=draw.randint(1, 40) if teacher.shared_expert_ffn else 0,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_counts_of_random_shapes_are_those_of_the_built_model(case):
    """Parameters, and the cache from the shapes of key and value projections, of transformers' modules."""
    config, draw = tiny_config(case), random.Random(case)
    teacher = dims_of(config)
    for _ in range(8):
        dims = random_shape(teacher, draw)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(resized(config, dims))
        assert replace(dims_of(model.config), family=dims.family) == dims
        biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
        total = sum(p.numel() for p in model.parameters()) + biases
        assert cost.num_params(dims) == total
        tables = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        assert cost.non_embedding_params(dims) == total - sum(tables.values())
        experts = dims.num_experts or 1
        idle = sum(p.numel() // experts for n, p in model.named_parameters() if ".experts." in n)
        idle *= experts - dims.experts_per_token
        assert cost.active_params(dims) == total - idle
        kv = sum(p.shape[0] for n, p in model.named_parameters() if n.endswith((".k_proj.weight", ".v_proj.weight")))
        if case in LATENT_CASES:  # of which keys and values are made again
            of_latents = (p.shape[0] for n, p in model.named_parameters() if n.endswith("kv_a_proj_with_mqa.weight"))
            kv = sum(of_latents)
        for layer in model.model.layers:
            if fused := getattr(layer.self_attn, "qkv_proj", None):
                kv += fused.weight.shape[0] - layer.self_attn.o_proj.weight.shape[1]
        assert cost.kv_cache_bytes_per_token(dims, 2) == 2 * kv
        assert cost.memory_bytes(dims, 100, 2) == 2 * total + 200 * kv


@pytest.mark.parametrize("case", CASES)
def test_flops_of_random_shapes_are_those_torch_counts(case):
    """Eager attention computes all S^2 products of which a causal one needs S (S + 1) / 2."""
    config, draw = tiny_config(case), random.Random(case)
    for _ in range(3):
        dims = random_shape(dims_of(config), draw)
        model = AutoModelForCausalLM.from_config(resized(config, dims), **EAGER)
        one, seq = counted_flops(model, 1), 6  # shorter than the windows of 7
        products = (counted_flops(model, seq) - seq * one) // (seq**2 - seq)
        want = seq * (one - products) + products * seq * (seq + 1) // 2
        assert cost.flops_per_token_forward(dims, seq) == want // seq


def counted_flops(model, seq):
    """FLOPs of the matrix products of a forward pass over `seq` tokens, without those that make the rotary angles."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(seq)[None])
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return by_module["Global"] - sum(flops for name, flops in by_module.items() if name.endswith("rotary_emb"))


def _megatron_holds(rank, world):
    mesh = mesh_of()
    dense = ("llama_tied_llama3_rope", "qwen3_attention_bias", "nemotron_tied_biases")
    for case in (*dense, "qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"):
        draw = random.Random(case)
        for _ in range(2):
            dims = random_shape(dims_of(tiny_config(case)), draw)
            model = build_model(dims, mesh, dtype=torch.float32, vocab_multiple=1)
            assert cost.num_params(dims) == sum(p.numel() for p in model.parameters())


def test_counts_are_those_of_our_model(tmp_path):
    run_ranks(_megatron_holds, 1, tmp_path)
