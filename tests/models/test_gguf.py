"""GGUF files, written here with llama.cpp's own writer, against the model they were written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.models.gguf import config_values, convert, undo_rope_interleaving
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.models.hf_config import quick_dims
from tests.support.tiny_models import tiny_model

HEADS, HEAD_DIM = 3, 8


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order, index by index: the two halves of a head become neighbours."""
    size = weight.shape[0] // heads
    out = torch.empty_like(weight)
    for head in range(heads):
        for pair in range(size // 2):
            for side in range(2):
                out[head * size + 2 * pair + side] = weight[head * size + side * (size // 2) + pair]
    return out


@pytest.mark.parametrize("shape", [(HEADS * HEAD_DIM, 5), (HEADS * HEAD_DIM,)], ids=["weight", "bias"])
def test_undo_rope_interleaving_by_index(shape: tuple[int, ...]) -> None:
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape)
    mixed = _interleaved(weight, HEADS)
    assert not torch.equal(mixed, weight)
    assert torch.equal(undo_rope_interleaving(mixed, HEADS), weight)


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_tensors(model: Any) -> dict[str, Tensor]:
    config = model.config
    tensors = {}
    for name, weight in model.state_dict().items():
        *parts, kind = name.split(".")
        if parts[:2] == ["model", "layers"]:
            part = ".".join(parts[3:])
            if "q_proj" in part:
                weight = _interleaved(weight, config.num_attention_heads)
            if "k_proj" in part:
                weight = _interleaved(weight, config.num_key_value_heads)
            tensors[f"blk.{parts[2]}.{_NAMES[part]}.{kind}"] = weight
        else:
            top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            tensors[f"{top['.'.join(parts)]}.{kind}"] = weight
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    return tensors


def _write(path: Path, model: Any, tensors: dict[str, Tensor], *, arch: str = "llama", scaling: bool = False) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    characters = [chr(code) for code in range(33, 31 + config.vocab_size)] + ["ab", "abc"]
    writer.add_tokenizer_model("llama" if arch == "gemma3" else "gpt2")
    writer.add_token_list(characters)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(characters))
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_token_scores([-float(i) for i in range(len(characters))])
    writer.add_token_merges(["a b", "ab c"])  # two: transformers 5.2 takes a list of one for its element
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.proves("formats", "GGUF in", "llama", "equal")
@pytest.mark.parametrize("tied", [False, True])
def test_convert_gives_the_model_back(tied: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied, rms_norm_eps=1e-5)
    _write(tmp_path / "tiny.gguf", model, _gguf_tensors(model))
    convert(tmp_path / "tiny.gguf", tmp_path / "hf")
    want = {name: w for name, w in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    dims, _ = open_hf(tmp_path / "hf")
    assert dims.norm_eps == 1e-5
    assert (dims.tied_embeddings, dims.head_dim, dims.num_query_groups) == (tied, 16, 2)


_GEMMA_NAMES = _NAMES | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@pytest.mark.proves("formats", "GGUF in", "gemma3_text", "equal")
def test_convert_gives_gemma_back_whose_file_has_one_added_to_norms(tmp_path: Path) -> None:
    """llama.cpp stores 1 + w, turns nothing, and says neither the local theta nor which layers are local."""
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    model = tiny_model("gemma3", num_hidden_layers=7, layer_types=kinds, rms_norm_eps=1e-6, query_pre_attn_scalar=256)
    tensors = {}
    for name, weight in model.state_dict().items():
        *parts, kind = name.split(".")
        if parts[:2] == ["model", "layers"]:
            name = f"blk.{parts[2]}.{_GEMMA_NAMES['.'.join(parts[3:])]}.{kind}"
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(
                ".".join(parts), ""
            ) + ".weight"
        if name != ".weight":  # the output layer is the table
            tensors[name] = weight + 1 if "norm." in name else weight
    _write(tmp_path / "tiny.gguf", model, tensors, arch="gemma3")
    convert(tmp_path / "tiny.gguf", tmp_path / "hf")
    got = load_file(tmp_path / "hf" / "model.safetensors")
    want = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    assert want.keys() == got.keys()
    for name, weight in want.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=2**-23 if "norm" in name else 0)
    dims, _ = open_hf(tmp_path / "hf")
    assert dims == dims_of(model.config)
    assert quick_dims(config_values(tmp_path / "tiny.gguf")) == dims


def test_what_cannot_be_converted_says_so(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = _gguf_tensors(model)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"no gguf at all, but long enough to have a header of some kind")
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        convert(path, tmp_path / "hf")
    _write(path, model, tensors, arch="gemma")
    with pytest.raises(CheckpointError, match="architecture gemma is not supported"):
        convert(path, tmp_path / "hf")
    _write(path, model, tensors, scaling=True)
    with pytest.raises(CheckpointError, match="rope scaling linear is not supported"):
        convert(path, tmp_path / "hf")
    _write(path, model, tensors | {"rope_freqs.weight": torch.ones(8)})
    with pytest.raises(CheckpointError, match="rope_freqs.weight is not supported"):
        convert(path, tmp_path / "hf")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        convert(path, tmp_path / "hf")
