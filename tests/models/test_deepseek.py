"""What DeepSeek's folders hold beside the model: weights in float8, layers for further tokens; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.families import dims_of, resized
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.models.hf_config import quick_dims, quick_folder_dims
from compactlm_nemo.models.limits import cut_problem, export_problem
from compactlm_nemo.search.cost import active_params, num_params
from tests.support.tiny_models import EAGER, save_tiny, tiny_config, tokens

PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "aux_loss_alpha": 0.001,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
        "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
    },
    "DeepSeek-V2-Lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "attention_bias": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}, "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
        "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    },
}  # fmt: skip
"""The published config.json, without notes of tools."""


@pytest.mark.parametrize(
    ("name", "total", "active"), [("DeepSeek-V3", "671", "38"), ("DeepSeek-V2-Lite", "15.7", "2.7")]
)
def test_published_configs_are_read_and_have_their_parameters(
    name: str, total: str, active: str, tmp_path: Path
) -> None:
    """Totals as the papers say; theirs of a token leave out the table that it is looked up in, and V3's round down."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    dims = dims_of(AutoConfig.from_pretrained(tmp_path))
    assert quick_folder_dims(tmp_path) == dims
    digits = len(total.partition(".")[2])
    assert f"{num_params(dims) / 1e9:.{digits}f}" == total
    assert f"{active_params(dims) / 1e9:.{digits}f}" == active
    scale = 0.1 * PUBLISHED[name]["rope_scaling"]["mscale"] * torch.tensor(40.0).log() + 1
    assert dims.attention_multiplier == pytest.approx(float(scale) ** 2 / 192**0.5)
    assert dims.rope_scaling is not None and dims.rope_scaling["attention_factor"] == 1


def _spoiled(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_in_float8_are_multiplied_with_the_scales_of_their_blocks(tmp_path: Path) -> None:
    """Two by two blocks, none of them whole; the reference goes element by element."""
    save_tiny("deepseek_v3", tmp_path, hidden_size=144, intermediate_size=136)
    plain = load_file(tmp_path / "model.safetensors")
    tensors, want, draw = dict(plain), dict(plain), torch.Generator().manual_seed(3)
    name = "model.layers.0.mlp.gate_proj.weight"
    coarse = (plain[name] * 40).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=draw) + 0.1
    tensors |= {name: coarse, f"{name}_scale_inv": scale}
    want[name] = torch.tensor(
        [
            [float(coarse[row, column].float()) * float(scale[row // 128, column // 128]) for column in range(144)]
            for row in range(136)
        ]
    )
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fp8 = PUBLISHED["DeepSeek-V3"]["quantization_config"]
    _spoiled(tmp_path, quantization_config=fp8)
    dims, source = open_hf(tmp_path)
    export_hf(tmp_path, tmp_path / "out", dims, source, torch.float32)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-7, atol=0)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    other = {**tensors, "model.layers.1.self_attn.o_proj.weight": plain["model.layers.1.self_attn.o_proj.weight"]}
    other["model.layers.1.self_attn.o_proj.weight"] = other["model.layers.1.self_attn.o_proj.weight"].to(coarse.dtype)
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks model.layers.1.self_attn.o_proj.weight_scale_inv"):
        open_hf(tmp_path)
    save_file(tensors | {f"{name}_scale_inv": scale[:1]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight_scale_inv has shape \[1, 2\] in the files and \[2, 2\]"
    ):
        open_hf(tmp_path)
    _spoiled(tmp_path, quantization_config=fp8 | {"weight_block_size": [64, 64]})
    with pytest.raises(CheckpointError, match=r"only fp8 in blocks of 128 x 128; give the weights in bfloat16"):
        open_hf(tmp_path)


def test_layers_that_predict_further_tokens_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny("deepseek_v3", tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    further = {name.replace("layers.3.", "layers.4."): x.clone() for name, x in plain.items() if "layers.3." in name}
    further |= {
        "model.layers.4.eh_proj.weight": torch.ones(48, 96),
        "model.layers.4.embed_tokens.weight": plain["lm_head.weight"].clone(),
    }
    save_file({**plain, **further}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _spoiled(tmp_path, num_nextn_predict_layers=1)
    with caplog.at_level("WARNING"):
        dims, source = open_hf(tmp_path)
    [line] = [record.getMessage() for record in caplog.records if "further tokens" in record.getMessage()]
    assert f"{len(further)} tensors of layers that predict further tokens are not read" in line
    export_hf(tmp_path, tmp_path / "out", dims, source, torch.float32)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == plain.keys() and all(torch.equal(got[name], plain[name]) for name in plain)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.num_nextn_predict_layers == 0 and config.num_hidden_layers == 4


def test_the_bias_of_the_choice_stays_float32(tmp_path: Path) -> None:
    """Rounded to bfloat16 it would choose other experts; transformers keeps it so whatever the format."""
    save_tiny("deepseek_v3", tmp_path)
    dims, source = open_hf(tmp_path)
    export_hf(tmp_path, tmp_path / "out", dims, source, torch.bfloat16)
    got, want = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path))
    for name, tensor in got.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype is (torch.float32 if is_bias else torch.bfloat16), name
        assert torch.equal(tensor, want[name].to(tensor.dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **EAGER)
    with torch.no_grad():
        assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True is not supported for deepseek_v3"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported for deepseek_v3"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported for deepseek_v3"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2 must be num_attention_heads=4"),
        ("deepseek_v3", {"n_group": 3}, "n_routed_experts=8 in n_group=3 with topk_group=1 do not fit"),
        ("deepseek_v3", {"n_group": 4}, "n_routed_experts=8 in n_group=4 with topk_group=1 do not fit"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank=0 must be a whole number > 0"),
        ("deepseek_v3", {"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0 must be a number > 0"),
        ("deepseek_v3", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with gate weights scaled to sum to 1"),
        (
            "deepseek_v3",
            {"n_routed_experts": 6},
            "has 18 tensors its config.json does not explain, first model.layers.1.mlp",
        ),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "lacks 3 tensors, first model.layers.1.mlp.gate_proj.weight"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported for deepseek_v2"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' must be greedy or group_limited_greedy"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias=True is not supported for deepseek_v2"),
    ],
)
def test_what_is_refused_is_one_useful_line(case: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_tiny(case, tmp_path)
    _spoiled(tmp_path, **changes)
    with pytest.raises(CheckpointError) as caught:
        open_hf(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_cuts_that_no_config_or_router_can_hold_are_refused() -> None:
    dims = dims_of(tiny_config("deepseek_v3"))
    assert export_problem(dims) is None and cut_problem(dims, dims) is None
    odd = export_problem(dims.with_shape(ffn=20))
    assert odd is not None and "search.shared_expert_ffn=48 must be a multiple of search.ffn=20 for deepseek_v3" in odd
    with pytest.raises(CheckpointError, match="must be a multiple of search.ffn=20"):
        resized(tiny_config("deepseek_v3"), dims.with_shape(ffn=20))
    assert export_problem(dims.with_shape(ffn=20, shared_expert_ffn=40)) is None
    for count, is_refused in ((7, True), (6, False), (4, True)):
        assert (cut_problem(dims, dims.with_shape(experts=count)) is not None) == is_refused
    plain = dims_of(tiny_config("deepseek_v3_tied_plain"))
    assert cut_problem(plain, plain.with_shape(experts=5)) is None
    two = dims_of(tiny_config("deepseek_v2"))
    assert "must be a multiple of search.heads=3" in (
        export_problem(two.with_shape(hidden=40, heads=3, groups=3)) or ""
    )


def test_dense_layers_go_and_stay_with_their_layers() -> None:
    config = tiny_config("deepseek_v3_tied_plain")  # layers 0 and 1 are dense
    dims = dims_of(config)
    for layers, dense in (([0, 1, 2], 2), ([1, 3], 1), ([2, 3], 0), ([0, 1], 2)):
        student = dims.keep_layers(layers)
        new = resized(config, student)
        assert new.first_k_dense_replace == dense and new.intermediate_size == 80
        assert dims_of(new) == student
        model = AutoModelForCausalLM.from_config(new)
        have = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
        assert have == [not is_dense for is_dense in student.dense_layers or []]
        biases = sum(x.numel() for name, x in model.named_buffers() if name.endswith("e_score_correction_bias"))
        assert num_params(student) == sum(x.numel() for x in model.parameters()) + biases


def test_quick_look_leaves_what_is_odd_to_transformers() -> None:
    assert quick_dims(PUBLISHED["DeepSeek-V3"]) is not None
    assert quick_dims(PUBLISHED["DeepSeek-V3"] | {"quantization_config": {"bits": 4}}) is None
