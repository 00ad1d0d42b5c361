"""A model as a checkpoint of Megatron-Bridge: which models it has, and the folder that it loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.models.bridge_config import LLAMA3_OF_MEGATRON, RUN_CONFIG
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.source import TOKENIZER, TRACKER, find_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compactlm_nemo.models.build import ParameterSource
    from compactlm_nemo.models.torch_dist import Part

FAMILIES_OF_BRIDGE = ("llama", "mistral", "qwen2", "qwen3", "nemotron", "qwen3_moe")
"""Families that Megatron-Bridge 0.3.1 and 0.6.2 convert, of ours."""

HF = "hf"
"""Folder beside the checkpoint with the model's config.json and tokenizer, which `AutoBridge` asks for."""


CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""How Megatron-Core has to read the shards: layers stacked, and no prefix before an optimizer's."""
_COUNTERS = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
_OF_THE_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json")


def bridge_problem(dims: Dims) -> str | None:
    """Return why Megatron-Bridge cannot hold a model of this architecture; None where it can."""
    if dims.family not in FAMILIES_OF_BRIDGE:
        return f"Megatron-Bridge has no {dims.family}, only {', '.join(FAMILIES_OF_BRIDGE)}"
    if dims.qkv_bias is not (dims.family == "qwen2") or dims.proj_bias or dims.mlp_bias:
        return f"Megatron-Bridge has no {dims.family} with biases in attention or MLP"
    scaling = dims.rope_scaling
    if scaling is None or scaling["rope_type"] == "linear":
        return None
    if scaling["rope_type"] != "llama3":
        return f"rope_type={scaling['rope_type']} is not written for Megatron-Bridge, only linear and llama3"
    others = {name: scaling[name] for name, only in LLAMA3_OF_MEGATRON.items() if scaling[name] != only}
    if others:
        (name, value), *_ = others.items()
        return (
            f"Megatron-Core's llama3 rope has {name}={LLAMA3_OF_MEGATRON[name]:g} and no setting, the model {value:g}"
        )
    return None


def export_bridge(
    hf_assets: Path, folder: Path, dims: Dims, source: ParameterSource, dtype: torch.dtype, shard_bytes: int
) -> int:
    """Write a checkpoint of iteration 0 that Megatron-Bridge loads, and return the number of parameters in it.

    Layers are stacked under Transformer Engine's names, the vocabulary is not padded, and `run_config.yaml` holds the
    settings of the model alone. `folder/hf` has its config.json, its tokenizer and an index without weights, by which
    `AutoBridge.from_hf_pretrained(folder/hf).export_ckpt` writes files of at most `shard_bytes`.

    Raises:
        NumericsError: a weight is NaN or infinite in this number format.
    """
    import torch

    from compactlm_nemo.models.hf import finite_as, shard_numbers, write_assets, write_index
    from compactlm_nemo.models.parameters import parameter_shapes
    from compactlm_nemo.models.torch_dist import write_torch_dist

    shards = folder / "iter_0000000"
    shards.mkdir(parents=True)
    num_params = sum(map(prod, parameter_shapes(dims).values()))
    write_assets(hf_assets, folder / HF, dims, dtype)
    write_index(folder / HF, shard_numbers(dims, dtype, shard_bytes), num_params * dtype.itemsize)
    _copy_tokenizer(folder / HF, shards / TOKENIZER)
    common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": CONTENT}
    write_torch_dist(shards, parts(dims), states(dims), lambda name: finite_as(source, name, dtype), dtype, common)
    (shards / RUN_CONFIG).write_text(run_config(dims, dtype), encoding="utf-8")
    state: dict[str, torch.Tensor] = {name: torch.tensor(0, dtype=torch.int32) for name in _COUNTERS}
    state["floating_point_operations_so_far"] = torch.tensor(0.0)
    state |= {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}
    for path in (shards / "train_state.pt", folder / "latest_train_state.pt"):
        torch.save(state, path)
    (folder / TRACKER).write_text("0")
    return num_params


def count_bridge(folder: Path) -> int:
    """Return parameters in the checkpoint of a folder that `export_bridge` wrote, counted from its index."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from compactlm_nemo.models.checkpoint_metadata import read_metadata

    weights = find_weights(folder)
    assert weights is not None
    stored = read_metadata(weights).state_dict_metadata.values()
    return sum(prod(tensor.size) for tensor in stored if isinstance(tensor, TensorStorageMetadata))


def _copy_tokenizer(hf: Path, target: Path) -> None:
    """Copy what Megatron-Bridge keeps beside a checkpoint: the tokenizer without the model's config."""
    target.mkdir()
    for path in sorted(hf.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _OF_THE_MODEL:
            shutil.copyfile(path, target / path.name)


def _fused_norms(dims: Dims) -> tuple[str, ...]:
    """Return the norms whose weights Transformer Engine keeps in the next linear layer: experts have no such layer."""
    return ("input_layernorm.",) if dims.num_experts else ("input_layernorm.", "pre_mlp_layernorm.")


def parts(dims: Dims, prefix: str = "") -> list[Part]:
    """Return where each parameter is written: `[layers, (experts,) ...]` in one tensor for all layers.

    Args:
        prefix: How every key begins.
    """
    from compactlm_nemo.models.checkpoint import stacked_place
    from compactlm_nemo.models.parameters import parameter_shapes
    from compactlm_nemo.models.torch_dist import Part

    counts = {"layers": dims.num_layers, "experts": dims.num_experts}
    found = []
    for name, shape in parameter_shapes(dims).items():
        key, at = stacked_place(name, fused_norms=_fused_norms(dims))
        size = (*(counts[axis] for axis in at), *shape)
        offsets = (*at.values(), *[0] * len(shape))
        found.append(Part(prefix + key, size, offsets, (*[1] * len(at), *shape), name))
    return found


def engine_tensors(dims: Dims, source: ParameterSource, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter under the name that it has in Megatron-Core's model with Transformer Engine's layers."""
    from compactlm_nemo.models.checkpoint import stacked_place
    from compactlm_nemo.models.hf import finite_as
    from compactlm_nemo.models.parameters import parameter_shapes

    for name in parameter_shapes(dims):
        key, at = stacked_place(name, fused_norms=_fused_norms(dims))
        if at:
            key = key.replace("layers.", f"layers.{at['layers']}.", 1)
        if "experts" in at:
            key = key.replace("mlp.experts.experts.", f"mlp.experts.local_experts.{at['experts']}.")
        yield key, finite_as(source, name, dtype)


def states(dims: Dims) -> list[str]:
    """Return the keys of Transformer Engine's states that Megatron-Bridge looks for: one a layer, and an expert."""
    layer = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    layer += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if dims.qk_norm else []
    layer += ["pre_mlp_layernorm"] if dims.num_experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    layers, experts = dims.num_layers, dims.num_experts
    keys = [f"decoder.layers.{name}._extra_state/shard_{i}_{layers}" for name in layer for i in range(layers)]
    keys += [
        f"decoder.layers.mlp.experts.experts.{name}._extra_state/shard_{i}.{expert}_{layers}.{experts}"
        for name in ("linear_fc1", "linear_fc2")
        for i in range(layers)
        for expert in range(experts)
    ]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


def run_config(dims: Dims, dtype: torch.dtype) -> str:
    """Return `run_config.yaml` as text: the settings of the model, and that nothing else was saved.

    Settings that only decide how fast it runs are left to Megatron-Bridge.
    """
    import yaml

    nothing_else = {"save_rng": False, "save_optim": False, "fully_parallel_save": True}
    return str(yaml.safe_dump({"model": model_settings(dims, dtype), "checkpoint": nothing_else}))


def model_settings(dims: Dims, dtype: torch.dtype) -> dict[str, Any]:
    """Return section `model`: what makes `bridge_config.dims_of_settings` give `dims` again."""
    number_format = str(dtype).removeprefix("torch.")
    activation = "torch.nn.functional.silu" if dims.gated_mlp else "megatron.core.activations.squared_relu"
    scaling = dims.rope_scaling or {"rope_type": None, "factor": 1.0}
    is_llama3, is_linear = (scaling["rope_type"] == kind for kind in ("llama3", "linear"))
    settings: dict[str, Any] = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "num_layers": dims.num_layers,
        "hidden_size": dims.hidden_size,
        "ffn_hidden_size": dims.ffn_hidden_size,
        "num_attention_heads": dims.num_heads,
        "num_query_groups": dims.num_query_groups,
        "kv_channels": dims.head_dim,
        "vocab_size": dims.vocab_size,
        "should_pad_vocab": False,
        "make_vocab_size_divisible_by": 1,
        "seq_length": dims.max_position_embeddings,
        "normalization": "LayerNorm" if dims.layer_norm_1p else "RMSNorm",
        "layernorm_zero_centered_gamma": dims.layer_norm_1p,
        "layernorm_epsilon": dims.norm_eps,
        "position_embedding_type": "rope",
        "rotary_base": dims.rope_theta,
        "rotary_percent": dims.rotary_percent,
        "rope_scaling": is_llama3,
        "rope_scaling_factor": scaling["factor"] if is_llama3 else 1.0,
        "seq_len_interpolation_factor": scaling["factor"] if is_linear else None,
        "gated_linear_unit": dims.gated_mlp,
        "activation_func": {"_target_": activation, "_call_": False},
        "add_bias_linear": False,
        "add_qkv_bias": dims.qkv_bias,
        "qk_layernorm": dims.qk_norm,
        "share_embeddings_and_output_weights": dims.tied_embeddings,
        "window_size": None if dims.window is None else [dims.window - 1, 0],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": number_format == "bfloat16",
        "fp16": number_format == "float16",
        "params_dtype": {"_target_": f"torch.{number_format}", "_call_": False},
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    if dims.num_experts:
        settings |= {
            "num_moe_experts": dims.num_experts,
            "moe_ffn_hidden_size": dims.ffn_hidden_size,
            "moe_router_topk": dims.experts_per_token,
            "moe_router_pre_softmax": not dims.norm_topk,
            "moe_grouped_gemm": True,
            "moe_token_dispatcher_type": "alltoall",
        }
    return settings
