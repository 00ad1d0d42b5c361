"""llama.cpp's GGUF file -> Hugging Face folder: dequantised weights, config and tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.outside import check_gguf_lengths, refuse_absurd_sizes

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONFIG = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""Key of a llama's GGUF file -> key of its Hugging Face config."""
_NO_CODE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def undo_rope_interleaving(weight: Tensor, heads: int) -> Tensor:
    """Put the halves of a head one after another, as Hugging Face does; llama.cpp stores rotary pairs side by side.

    Row `head * d + 2 * p + s` (pair p, side s) of the file is row `head * d + s * d/2 + p` of the result; `weight` is
    `[heads * d, ...]`, a matrix or its bias.
    """
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _open(path: Path) -> Any:
    import gguf

    check_gguf_lengths(path)
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"model.source={path} is not a readable GGUF file: {error}") from None


def config_values(path: Path) -> dict[str, Any] | None:
    """Return what the file's Hugging Face config would say of its sizes; None where `read` has to complain."""
    try:
        reader = _open(path)
    except CheckpointError:
        return None
    if _field(reader, "general.architecture") != "llama" or _field(reader, "llama.rope.scaling.type"):
        return None
    values = {name: _field(reader, f"llama.{key}") for key, name in _CONFIG.items()}
    if None in values.values():
        return None
    refuse_absurd_sizes(values, f"model.source={path}")
    return values | {
        "model_type": "llama",
        "rms_norm_eps": round(values["rms_norm_eps"], 12),
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
    }


def read(path: Path) -> tuple[Any, Any]:
    """Return the open file and its transformers config; CheckpointError unless it is a llama that can be converted."""
    import torch
    from transformers import AutoConfig

    reader = _open(path)
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"model.source={path}: GGUF architecture {architecture} is not supported; only llama is.")
    scaling = _field(reader, "llama.rope.scaling.type")
    if scaling not in (None, "none"):
        raise CheckpointError(f"model.source={path}: GGUF rope scaling {scaling} is not supported; use the HF folder.")
    values = {name: _field(reader, f"llama.{key}") for key, name in _CONFIG.items()}
    refuse_absurd_sizes(values, f"model.source={path}")
    config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **_NO_CODE)
    config.__dict__.pop("_model_name_or_path", None)  # a remark of the file's author, not of the model
    config.tie_word_embeddings = "lm_head.weight" not in {_hf_name(tensor.name) for tensor in reader.tensors}
    config.rms_norm_eps = round(config.rms_norm_eps, 12)  # GGUF holds it in float32: 1e-5 reads 9.99999974e-06
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float32
    return reader, config


def convert(path: Path, folder: Path) -> None:
    """Write `path` as a Hugging Face folder in float32. Only the llama architecture is supported."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GenerationConfig

    reader, config = read(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped read-only
        tensors[_hf_name(tensor.name)] = _in_hf_order(tensor.name, weight, config)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **_NO_CODE).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _field(reader: Any, name: str) -> Any:
    """Return the value of a GGUF key, None where the file has no such key."""
    return reader.fields[name].contents() if name in reader.fields else None


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _LAYER:
        raise CheckpointError(f"GGUF tensor {name} is not supported; use the Hugging Face folder of this model.")
    layer, part, kind = match.groups()
    return f"model.layers.{layer}.{_LAYER[part]}.{kind}"


def _in_hf_order(name: str, weight: Tensor, config: Any) -> Tensor:
    if ".attn_q." in name:
        return undo_rope_interleaving(weight, config.num_attention_heads)
    if ".attn_k." in name:
        return undo_rope_interleaving(weight, config.num_key_value_heads)
    return weight
