"""llama.cpp's GGUF file -> Hugging Face folder: dequantised weights, config and tokenizer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.hf_assets import is_paper
from compactlm_nemo.models.outside import GgufHeader, companion, gguf_header, refuse_absurd_sizes

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
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
"""Key of a GGUF file, behind the name of its architecture -> key of a Hugging Face config."""


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp's file of one architecture holds, and how it differs from Hugging Face's."""

    model_type: str
    class_name: str
    layer: Mapping[str, str]
    """Tensor of a layer -> Hugging Face's."""
    config: Mapping[str, str]
    turns_pairs: bool = False
    """Whether rows of queries and keys are stored for rotation in pairs."""
    norm_plus: float = 0.0
    """What was added to the weights of norms."""


_ARCHITECTURES = {
    "llama": _Architecture(
        "llama", "LlamaForCausalLM", _LAYER, _CONFIG | {"rope.dimension_count": "head_dim", "vocab_size": "vocab_size"},
        turns_pairs=True,
    ),
    "gemma3": _Architecture(
        "gemma3_text", "Gemma3ForCausalLM",
        _LAYER
        | {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        _CONFIG | {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"},
        norm_plus=1.0,
    ),
}  # fmt: skip
_NO_CODE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def undo_rope_interleaving(weight: Tensor, heads: int) -> Tensor:
    """Put the halves of a head one after another, as Hugging Face does; llama.cpp stores rotary pairs side by side.

    Row `head * d + 2 * p + s` (pair p, side s) of the file is row `head * d + s * d/2 + p` of the result; `weight` is
    `[heads * d, ...]`, a matrix or its bias.
    """
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _open(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"model.source={path} is not a readable GGUF file: {error}") from None


def config_values(path: Path) -> dict[str, Any] | None:
    """Return what the file's Hugging Face config would say of its sizes; None where `read` has to complain."""
    try:
        header = gguf_header(path)
        values = _sizes(header, path)
    except CheckpointError:
        return None
    if None in values.values():
        return None
    return values | {
        "model_type": _ARCHITECTURES[header.fields["general.architecture"]].model_type,
        "rms_norm_eps": round(values["rms_norm_eps"], 12),
        "tie_word_embeddings": "output.weight" not in header.shapes,
    }


def _sizes(header: GgufHeader, path: Path) -> dict[str, Any]:
    """Return the sizes that the file says, under Hugging Face's names, None where it says none."""
    kind = header.fields.get("general.architecture")
    if kind not in _ARCHITECTURES:
        known = " and ".join(_ARCHITECTURES)
        raise CheckpointError(
            f"model.source={path}: GGUF architecture {kind} is not supported; only {known} are. Use the HF folder."
        )
    scaling = header.fields.get(f"{kind}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise CheckpointError(f"model.source={path}: GGUF rope scaling {scaling} is not supported; use the HF folder.")
    values = {name: header.fields.get(f"{kind}.{key}") for key, name in _ARCHITECTURES[kind].config.items()}
    if values.get("vocab_size") is None and (table := header.shapes.get("token_embd.weight")):
        values["vocab_size"] = table[-1]
    refuse_absurd_sizes(values, f"model.source={path}")
    return values


def read(path: Path) -> tuple[Any, Any]:
    """Return the open file and its transformers config; CheckpointError unless it can be converted."""
    import torch
    from transformers import AutoConfig

    header = gguf_header(path)
    values = _sizes(header, path)
    reader = _open(path)
    config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **_NO_CODE)
    config.__dict__.pop("_model_name_or_path", None)  # a remark of the file's author, not of the model
    config.tie_word_embeddings = "output.weight" not in header.shapes
    config.rms_norm_eps = round(config.rms_norm_eps, 12)  # GGUF holds it in float32: 1e-5 reads 9.99999974e-06
    config.architectures = [_ARCHITECTURES[header.fields["general.architecture"]].class_name]
    config.dtype = torch.float32
    for name in ("vocab_size", "sliding_window"):
        if values.get(name) is not None:
            setattr(config, name, values[name])
    return reader, config


def convert(path: Path, folder: Path) -> None:
    """Write `path` as a Hugging Face folder in float32, for the architectures of `_ARCHITECTURES`.

    What a licence asks to pass on, beside the file, goes with it.
    """
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GenerationConfig

    reader, config = read(path)
    architecture = next(known for known in _ARCHITECTURES.values() if known.model_type == config.model_type)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped read-only
        if "norm." in tensor.name:
            weight -= architecture.norm_plus
        if architecture.turns_pairs:
            weight = _in_hf_order(tensor.name, weight, config)
        tensors[_hf_name(tensor.name, architecture)] = weight
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **_NO_CODE).save_pretrained(folder)
    for paper in path.parent.iterdir():
        if paper.is_file() and is_paper(paper.name):
            shutil.copyfile(companion(path.parent, paper.name) or paper, folder / paper.name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _hf_name(name: str, architecture: _Architecture) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in architecture.layer:
        raise CheckpointError(f"GGUF tensor {name} is not supported; use the Hugging Face folder of this model.")
    layer, part, kind = match.groups()
    return f"model.layers.{layer}.{architecture.layer[part]}.{kind}"


def _in_hf_order(name: str, weight: Tensor, config: Any) -> Tensor:
    if ".attn_q." in name:
        return undo_rope_interleaving(weight, config.num_attention_heads)
    if ".attn_k." in name:
        return undo_rope_interleaving(weight, config.num_key_value_heads)
    return weight
