"""Every family on every layout against transformers, and back to Hugging Face bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compactlm_nemo.models.build import build_model, global_names
from compactlm_nemo.models.checkpoint import CheckpointSource, load_model, save_model
from compactlm_nemo.models.families import dims_of, resized
from compactlm_nemo.models.hf import count_params, export_hf, open_hf
from tests.support.meshes import LAYOUTS, VOCAB_MULTIPLE, filled, mesh_of, whole_logits
from tests.support.ranks import run_ranks
from tests.support.tiny_models import CASES, EAGER, LATENT_CASES, LENGTH, save_tiny, tiny_config, tiny_model, tokens


@pytest.fixture(scope="module")
def hf_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case with the Hugging Face model and its logits."""
    root = tmp_path_factory.mktemp("hf")
    for case in CASES:
        model = save_tiny(case, root / case)
        with torch.no_grad():
            torch.save(model(tokens()).logits, root / case / "logits.pt")
    return root


def _compare_and_save(rank: int, world: int, layout: str, root: Path, out: Path) -> None:
    mesh = mesh_of(**LAYOUTS[layout][1])
    for case in CASES:
        case_dims, model = filled(root / case, mesh)
        got = whole_logits(model.eval(), case_dims, mesh, tokens())
        if got is not None:
            want = torch.load(root / case / "logits.pt")
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4, msg=lambda m, case=case: f"{case}: {m}")
        save_model(out / case, model)
        copy = build_model(case_dims, mesh, dtype=torch.float32, vocab_multiple=VOCAB_MULTIPLE)
        load_model(out / case, copy)
        for (name, a), b in zip(global_names(model), copy.parameters(), strict=True):
            assert torch.equal(a, b), f"{case}: {name} differs after saving and loading"


# The others are parts of these: tp2 and pp2 of tp2_pp2.
@pytest.mark.proves("layouts", "{layout}", CASES, "logits")
@pytest.mark.proves("formats", ["Hugging Face in", "Hugging Face out"], CASES, "equal")
@pytest.mark.parametrize("layout", ["1", "tp2_sp", "pp1_3", "vpp2", "cp2", "tp2_pp2", "tp2_sp_cp2"])
def test_logits_are_those_of_transformers_and_export_is_exact(layout: str, hf_root: Path, tmp_path: Path) -> None:
    dims = {case: open_hf(hf_root / case)[0] for case in CASES}
    run_ranks(_compare_and_save, LAYOUTS[layout][0], tmp_path, layout, hf_root, tmp_path / "ck")
    for case in CASES:
        source = CheckpointSource(tmp_path / "ck" / case, dims[case])
        target = tmp_path / "export" / case
        written = export_hf(hf_root / case, target, dims[case], source, torch.float32)
        want, got = load_file(hf_root / case / "model.safetensors"), load_file(target / "model.safetensors")
        assert want.keys() == got.keys(), case
        assert all(torch.equal(want[name], got[name]) for name in want), case
        assert written == count_params(target) == sum(tensor.numel() for tensor in want.values())
        model, info = AutoModelForCausalLM.from_pretrained(target, **EAGER, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (case, info)
        with torch.no_grad():
            assert torch.equal(model.eval()(tokens()).logits, torch.load(hf_root / case / "logits.pt")), case


def test_cases_would_show_the_difference() -> None:
    """The references depend on what each case is about: a window, partial rotation, the scaling of the frequencies."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    full = {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 1.0}
    yarn = CASES["deepseek_v3"][1]["rope_parameters"]
    for case, changes in (
        ("mistral_window", {"sliding_window": LENGTH}),
        ("mistral_window", {"sliding_window": 8}),
        ("llama_tied_llama3_rope", {"rope_parameters": plain}),
        ("nemotron", {"rope_parameters": full}),
        ("llama", {"rms_norm_eps": 1e-6}),
        ("nemotron", {"norm_eps": 1e-6}),
        ("olmo2", {"rms_norm_eps": 1e-6}),
        ("glm4", {"rope_parameters": full}),
        ("glm", {"rope_parameters": full}),
        ("glm_tied_no_bias", {"rope_parameters": plain | {"partial_rotary_factor": 0.25}}),
        ("phi3", {"sliding_window": 8}),
        *(
            ("granite", {key: 1.0})
            for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        ),
        ("phi3", {"rope_parameters": plain | {"partial_rotary_factor": 1.0}}),
        ("phi3_tied_longrope", {"original_max_position_embeddings": LENGTH}),
        ("phi3_tied_longrope", {"rope_parameters": plain | {"partial_rotary_factor": 0.5}}),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}),
        ("smollm3_biases", {"no_rope_layers": [1, 1, 1, 1]}),
        ("mixtral", {"sliding_window": 8}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe_tied_top1", {"num_experts_per_tok": 2}),
        ("gpt_oss", {"sliding_window": 8}),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("gpt_oss", {"num_experts_per_tok": 1}),
        ("gpt_oss", {"rope_parameters": tiny_config("gpt_oss").rope_parameters | {"truncate": True}}),
        ("deepseek_v3", {"rms_norm_eps": 1e-6}),
        ("deepseek_v3", {"rope_parameters": yarn | {"mscale": 1.5}}),
        ("deepseek_v3", {"rope_parameters": yarn | {"mscale_all_dim": 0.7}}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"n_group": 1}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"routed_scaling_factor": 1.0}),
        ("deepseek_v3_tied_plain", {"rope_interleave": True}),
        ("deepseek_v3_tied_plain", {"norm_topk_prob": True}),
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v2", {"rope_parameters": yarn | {"mscale_all_dim": 0.7}}),
        ("deepseek_v2", {"routed_scaling_factor": 1.0}),
        ("deepseek_v2_tied_greedy", {"num_experts_per_tok": 2}),
    ):
        with torch.no_grad():
            gap = tiny_model(case)(tokens()).logits - tiny_model(case, **changes)(tokens()).logits
        assert gap.abs().max() > 1e-2, (case, changes)


def test_shards_hold_the_model_together(hf_root: Path, tmp_path: Path) -> None:
    dims, source = open_hf(hf_root / "qwen3")
    export_hf(hf_root / "qwen3", tmp_path, dims, source, torch.float32, shard_bytes=60_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()).logits, torch.load(hf_root / "qwen3" / "logits.pt"))
    assert open_hf(tmp_path)[0] == dims


@pytest.mark.parametrize("case", CASES)
def test_resized_config_makes_the_smaller_model(case: str) -> None:
    config = tiny_config(case)
    shared = {"shared_expert_ffn": 2 * 56} if case in LATENT_CASES else {}
    small = dims_of(config).with_shape(layers=3, hidden=24, ffn=56, heads=2, groups=2, **shared)
    new = resized(config, small)
    assert dims_of(new) == small
    assert config.num_hidden_layers == 4, "the config given is not changed"
    model = AutoModelForCausalLM.from_config(new)
    assert len(model.model.layers) == 3
    attention, width = model.model.layers[0].self_attn, 2 * small.head_dim
    if hasattr(attention, "qkv_proj"):
        assert attention.qkv_proj.weight.shape == (3 * width, 24)
    elif case in LATENT_CASES:
        assert attention.o_proj.weight.shape == (24, width)
        assert attention.kv_b_proj.weight.shape == (2 * (12 + 16), 20)
        assert (attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj).weight.shape[0] == 2 * 20
    else:
        assert attention.q_proj.weight.shape == attention.k_proj.weight.shape == (width, 24)
    mlp = model.model.layers[-1].mlp
    if small.num_experts:
        assert mlp.experts.down_proj.shape == (
            (small.num_experts, 56, 24) if small.router_bias else (small.num_experts, 24, 56)
        )
    else:
        assert mlp.down_proj.weight.shape == (24, 56)
    if getattr(new, "layer_types", None):
        assert len(new.layer_types) == 3
    if case in LATENT_CASES:
        assert mlp.shared_experts.down_proj.weight.shape == (24, 2 * 56)
        assert model.model.layers[0].mlp.down_proj.weight.shape == (24, 80), "dense layers stay as wide as they are"
