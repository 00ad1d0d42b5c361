"""A model as a NeMo 2 checkpoint: which models NeMo has, and the folder that `llm` loads, written without NeMo."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.models.bridge import engine_tensors, parts, states
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.nemo_config import (
    CONFIGS,
    CONTEXT,
    IO,
    LLAMA3,
    MODELS,
    NEMO_TOKENIZER,
    PACKAGE,
    YAML,
    nemo_name,
)
from compactlm_nemo.models.source import WEIGHTS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compactlm_nemo.models.build import ParameterSource

PREFIX = "module."
"""How NeMo's keys of weights begin."""

_SETTINGS = {
    "llama": "LlamaConfig", "mistral": "MistralConfig7B", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoEConfig", "nemotron": "NemotronConfig", "mixtral": "MixtralConfig8x7B",
}  # fmt: skip
"""Family -> the class of settings that NeMo's own import takes; of a llama with scaled frequencies Llama31Config."""
_MODULES = {"qwen3_moe": "qwen3"}
"""Family -> its module in NeMo, where that has another name."""
_NEVER_TIED = ("mistral", "qwen2", "nemotron", "mixtral")
"""Families whose export by NeMo looks for an output layer in every checkpoint."""

_log = logging.getLogger(__name__)


def nemo_problem(dims: Dims) -> str | None:
    """Return why NeMo 2 cannot hold a model of this architecture, or cannot export it again; None where it can."""
    family, scaling = dims.family, dims.rope_scaling
    if nemo_name(family) is None:
        return f"NeMo 2 has no {family}, only {', '.join(_SETTINGS)}"
    if dims.qkv_bias is not (family == "qwen2") or dims.proj_bias or dims.mlp_bias:
        return f"NeMo 2 exports no {family} with biases in attention or MLP"
    if dims.window is not None and family != "mistral":
        return f"NeMo 2 exports no {family} with a window of attention"
    if scaling is not None and (family != "llama" or scaling["rope_type"] != "llama3"):
        return f"NeMo 2 has no {family} with rope_type={scaling['rope_type']}, only a llama with llama3"
    if family == "qwen3_moe" and not dims.norm_topk:
        return "NeMo 2 exports a qwen3_moe with norm_topk_prob=true alone"
    return None


def untied_for_nemo(dims: Dims) -> Dims:
    """Return the architecture with an output layer of its own where NeMo cannot export a tied model of its family."""
    return replace(dims, tied_embeddings=False) if dims.family in _NEVER_TIED else dims


def _with_head(dims: Dims, source: ParameterSource) -> ParameterSource:
    """Return the source of a tied model with the embedding as its output layer."""
    from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER

    return lambda name: source(EMBEDDING if dims.tied_embeddings and name == OUTPUT_LAYER else name)


def nemo_tensors(dims: Dims, source: ParameterSource, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a checkpoint under the name that it has in NeMo's model."""
    return engine_tensors(untied_for_nemo(dims), _with_head(dims, source), dtype)


def export_nemo(
    hf_assets: Path, folder: Path, dims: Dims, source: ParameterSource, dtype: torch.dtype, shard_bytes: int
) -> int:
    """Write a checkpoint that `llm.export_ckpt` and `llm.finetune` of NeMo 2 load; return the number of parameters.

    Weights are in one file, layers stacked under Transformer Engine's names, the vocabulary is not padded. Of a tied
    model that NeMo could not export the embedding is written a second time as output layer, as NeMo's own import does.

    Raises:
        NumericsError: a weight is NaN or infinite in this number format.
    """
    from compactlm_nemo.models.hf import finite_as, write_assets
    from compactlm_nemo.models.parameters import parameter_shapes
    from compactlm_nemo.models.torch_dist import write_torch_dist

    tokenizer, context = folder / CONTEXT / NEMO_TOKENIZER, folder / CONTEXT
    held = untied_for_nemo(dims)
    if held != dims:
        _log.warning(
            "%s: NeMo 2 exports no tied %s, so its embedding is written twice, as NeMo's own import does; training it "
            "there lets the two part.", folder, dims.family,
        )  # fmt: skip

    def read(name: str) -> torch.Tensor:
        return finite_as(_with_head(dims, source), name, dtype)

    context.mkdir(parents=True)
    write_assets(hf_assets, tokenizer, dims, dtype)
    artifacts = context / "artifacts"
    if (tokenizer / "generation_config.json").is_file():
        artifacts.mkdir()
        shutil.move(tokenizer / "generation_config.json", artifacts)
    (tokenizer / "config.json").unlink()  # the model's: in the tokenizer's folder NeMo keeps none
    (context / IO).write_text(json.dumps(io_description(held, dtype, artifacts.is_dir()), indent=1), encoding="utf-8")
    (context / YAML).write_text(model_yaml(held, dtype), encoding="utf-8")
    objects = [PREFIX + key for key in states(held)]
    write_torch_dist(folder / WEIGHTS, parts(held, PREFIX), objects, read, dtype, {})
    return sum(map(prod, parameter_shapes(held).values()))


def nemo_settings(dims: Dims, dtype: torch.dtype) -> dict[str, Any]:
    """Return the model's settings: what makes `nemo_config.dims_of_nemo` give `dims` again."""
    number_format = str(dtype).removeprefix("torch.")
    settings: dict[str, Any] = {
        "num_layers": dims.num_layers,
        "hidden_size": dims.hidden_size,
        "ffn_hidden_size": dims.ffn_hidden_size,
        "num_attention_heads": dims.num_heads,
        "num_query_groups": dims.num_query_groups,
        "kv_channels": dims.head_dim,
        "seq_length": dims.max_position_embeddings,
        "vocab_size": dims.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "layernorm_epsilon": dims.norm_eps,
        "rotary_base": dims.rope_theta,
        "rotary_percent": dims.rotary_percent,
        "share_embeddings_and_output_weights": dims.tied_embeddings,
        "bf16": number_format == "bfloat16",
        "fp16": number_format == "float16",
        "params_dtype": f"torch.{number_format}",
    }
    if MODELS[str(nemo_name(dims.family))].positions == "max_position_embeddings":
        settings["max_position_embeddings"] = dims.max_position_embeddings
    if dims.family == "mistral":
        settings["window_size"] = None if dims.window is None else [dims.window, 0]
    if dims.rope_scaling is not None:
        settings |= dict(zip(LLAMA3, (dims.rope_scaling[name] for name in _LLAMA3_HERE), strict=True))
    if dims.num_experts:
        settings |= {
            "num_moe_experts": dims.num_experts,
            "moe_router_topk": dims.experts_per_token,
            "moe_router_pre_softmax": not dims.norm_topk,
            "moe_ffn_hidden_size": dims.ffn_hidden_size,
        }
    return settings


_LLAMA3_HERE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _classes(dims: Dims) -> tuple[str, str, str]:
    """Return the names of NeMo's module, class of models and class of settings."""
    settings = "Llama31Config" if dims.rope_scaling is not None else _SETTINGS[dims.family]
    return f"{PACKAGE}.{_MODULES.get(dims.family, dims.family)}", str(nemo_name(dims.family)), settings


_TOKENIZER_CLASS = ("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer")


def model_yaml(dims: Dims, dtype: torch.dtype) -> str:
    """Return `context/model.yaml`, which NeMo's own tools of deployment read; it is JSON, which YAML reads."""
    module, model, settings = _classes(dims)
    values = {"_target_": f"{module}.{settings}"} | CONFIGS[settings] | nemo_settings(dims, dtype)
    for name in ("activation_func", "params_dtype"):
        values[name] = {"_target_": values[name], "_call_": False}
    tokenizer = {"_target_": ".".join(_TOKENIZER_CLASS), "pretrained_model_name": NEMO_TOKENIZER}
    return json.dumps({"_target_": f"{module}.{model}", "config": values, "tokenizer": tokenizer}, indent=1)


def io_description(dims: Dims, dtype: torch.dtype, has_generation: bool = False) -> dict[str, Any]:
    """Return `context/io.json`: a trainer's context with model, settings and tokenizer, in the form of Fiddle."""
    module, model, settings = _classes(dims)
    made = _Description()
    values = {
        name: made.value(value, f"<root>.model.config.{name}") for name, value in nemo_settings(dims, dtype).items()
    }
    if has_generation:
        made_by = {
            "auto_cls": {"type": "pyref", "module": "transformers", "name": "GenerationConfig"},
            "pretrained_model_name_or_path": made.value("./artifacts", "<root>.model.config.generation_config"),
        }
        place = "<root>.model.config.generation_config"
        values["generation_config"] = made.config(
            "nemo.lightning.io.artifact.hf_auto", "from_pretrained", made_by, place
        )
    config = made.config(module, settings, values, "<root>.model.config")
    named = {"pretrained_model_name": made.value(NEMO_TOKENIZER, "<root>.model.tokenizer.pretrained_model_name")}
    tokenizer = made.config(*_TOKENIZER_CLASS, named, "<root>.model.tokenizer")
    devices = {"accelerator": made.value("cpu", "<root>.trainer.accelerator")}
    devices["devices"] = made.value(1, "<root>.trainer.devices")
    context = {
        "model": made.config(module, model, {"config": config, "tokenizer": tokenizer}, "<root>.model"),
        "trainer": made.config("nemo.lightning.pytorch.trainer", "Trainer", devices, "<root>.trainer"),
        "extra": made.add("dict", _empty_dict() | {"paths": ["<root>.extra"]}),
    }
    root = made.config("nemo.lightning.io.pl", "TrainerContext", context, "<root>")
    return {"root": root, "objects": made.objects, "refcounts": {}, "version": "0.0.1"}


def _builtin(name: str) -> dict[str, Any]:
    return {"type": "pyref", "module": "builtins", "name": name}


def _empty_dict() -> dict[str, Any]:
    empty: dict[str, Any] = {"type": _builtin("tuple"), "items": [], "metadata": None}
    return {"type": _builtin("dict"), "items": [], "metadata": empty}


class _Description:
    """Objects in the form of Fiddle's JSON, version 0.0.1."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def add(self, kind: str, described: dict[str, Any]) -> dict[str, Any]:
        """Add an object and return the reference to it."""
        number = sum(key.rpartition("_")[0] == kind for key in self.objects) + 1
        self.objects[f"{kind}_{number}"] = described
        return {"type": "ref", "key": f"{kind}_{number}"}

    def value(self, value: Any, path: str) -> dict[str, Any]:
        """Return a plain value, a list of them, or the name of a torch dtype."""
        if isinstance(value, list):
            items = [[f"Index(index={i})", self.value(item, f"{path}[{i}]")] for i, item in enumerate(value)]
            return self.add("list", {"type": _builtin("list"), "items": items, "metadata": None, "paths": [path]})
        if isinstance(value, str) and value.startswith("torch."):
            return {"type": "pyref", "module": "torch", "name": value.removeprefix("torch."), "paths": [path]}
        return {"type": "leaf", "value": value, "paths": [path]}

    def config(self, module: str, name: str, arguments: dict[str, Any], path: str) -> dict[str, Any]:
        """Add a call of a class or function with these arguments, and return the reference to it."""
        fiddle = "fiddle._src.config"
        names = [[f"Index(index={i})", argument] for i, argument in enumerate(arguments)]
        kind = {"type": "pyref", "module": fiddle, "name": "BuildableTraverserMetadata"}
        metadata = {
            "fn_or_cls": {"type": "pyref", "module": module, "name": name},
            "argument_names": self.add("tuple", {"type": _builtin("tuple"), "items": names, "metadata": None}),
            "argument_tags": self.add("dict", _empty_dict()),
            "argument_history": self.add("dict", _empty_dict()),
        }
        described = {"type": kind, "items": [[f"Attr(name='{k}')", v] for k, v in metadata.items()], "metadata": kind}
        return self.add(
            "config",
            {
                "type": {"type": "pyref", "module": fiddle, "name": "Config"},
                "items": [[f"Attr(name='{argument}')", value] for argument, value in arguments.items()],
                "metadata": self.add("metadata", described),
                "paths": [path],
            },
        )
