"""Experts of a layer in one tensor: read one by one, and unpacked from MXFP4 as transformers unpacks them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.models.hf_config import quick_folder_dims
from compactlm_nemo.models.merged_experts import unpacked
from tests.support.tiny_models import EAGER, save_tiny, tokens

SIZES = {"hidden_size": 64, "intermediate_size": 32}
"""Multiples of 32, as the groups of MXFP4 are."""
REAL = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def packed(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random blocks and scales of a merged matrix `[E, I, O]`."""
    experts, inputs, outputs = shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(122, 126, blocks.shape[:3], dtype=torch.uint8, generator=generator)


def pack(folder: Path) -> dict[str, Tensor]:
    """Put packed matrices in the place of a folder's; return what transformers makes of them, by their names."""
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(4)
    plain = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = packed(tuple(tensors.pop(name).shape), generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | REAL))
    return plain


def test_every_byte_and_scale_is_unpacked_as_by_transformers() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16)[None]
    want = convert_moe_packed_tensors(blocks, scales)[0]
    got = unpacked(blocks[0], scales[0])
    assert got.dtype == want.dtype == torch.bfloat16 and got.shape == want.shape == (512, 256)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert (got[:, 127].unique() == torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])).all()


def test_a_packed_model_is_the_unpacked_one(tmp_path: Path) -> None:
    """It is exported with plain matrices, and without the words of how it was packed."""
    save_tiny("gpt_oss", tmp_path / "packed", **SIZES)
    plain = pack(tmp_path / "packed")
    dims, source = open_hf(tmp_path / "packed")
    assert dims == quick_folder_dims(tmp_path / "packed")
    written = export_hf(tmp_path / "packed", tmp_path / "hf", dims, source, torch.bfloat16)
    got, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "packed"))
    assert written == sum(tensor.numel() for tensor in got.values())
    assert len(plain) == 8 and all(torch.equal(got[name], value) for name, value in plain.items())
    others = {name: tensor for name, tensor in kept.items() if not name.endswith(("_blocks", "_scales"))}
    assert got.keys() == plain.keys() | others.keys()
    assert all(torch.equal(got[name], tensor.bfloat16()) for name, tensor in others.items())
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **EAGER, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(("end", "words"), [("_scales", "lacks 1 tensors, first"), ("_blocks", "lacks 1 tensors")])
def test_half_of_a_packed_matrix_is_refused(end: str, words: str, tmp_path: Path) -> None:
    save_tiny("gpt_oss", tmp_path, **SIZES)
    pack(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.experts.down_proj{end}"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        open_hf(tmp_path)


def test_the_config_of_openai_is_read(tmp_path: Path) -> None:
    """It says some sizes twice, of which an exported student's are its own."""
    save_tiny("gpt_oss", tmp_path)
    plain = quick_folder_dims(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    theirs = values | REAL | {"experts_per_token": 2, "initial_context_length": 64, "swiglu_limit": 7.0}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    dims, source = open_hf(tmp_path)
    assert dims == quick_folder_dims(tmp_path) == plain is not None
    export_hf(tmp_path, tmp_path / "hf", dims, source, torch.float32)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["experts_per_token"] == written["num_experts_per_tok"] == 2


def test_of_all_experts_one_is_read_at_a_time(tmp_path: Path) -> None:
    """Its parameters are those of the tensor of all: gate and up in turns, inputs before outputs."""
    save_tiny("gpt_oss", tmp_path)
    merged = load_file(tmp_path / "model.safetensors")
    _, source = open_hf(tmp_path)
    for expert in range(4):
        name = f"decoder.layers.2.mlp.experts.local_experts.{expert}."
        fc1, fc1_bias = source(f"{name}linear_fc1.weight"), source(f"{name}linear_fc1.bias")
        prefix = "model.layers.2.mlp.experts."
        for j in range(24):
            for half, row in ((0, j), (1, 24 + j)):
                assert torch.equal(fc1[row], merged[f"{prefix}gate_up_proj"][expert, :, 2 * j + half])
                assert fc1_bias[row] == merged[f"{prefix}gate_up_proj_bias"][expert, 2 * j + half]
        assert torch.equal(source(f"{name}linear_fc2.weight"), merged[f"{prefix}down_proj"][expert].T)
        assert torch.equal(source(f"{name}linear_fc2.bias"), merged[f"{prefix}down_proj_bias"][expert])
