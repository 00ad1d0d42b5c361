"""What `context/` of a NeMo 2 checkpoint says of its model, and the architecture that follows from it.

`context/io.json` describes Python objects in Fiddle's form. It is read as the JSON that it is and nothing in it is made
or imported: names of classes are looked up in tables, numbers are taken.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.bridge_config import dims_of_settings
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import FAMILIES
from compactlm_nemo.models.hf_config import config_values, quick_dims
from compactlm_nemo.models.outside import refuse_large_config

CONTEXT, IO, YAML = "context", "io.json", "model.yaml"
NEMO_TOKENIZER = "nemo_tokenizer"
"""Folder in `context/` with the tokenizer's files."""

PACKAGE = "nemo.collections.llm.gpt.model"

_GATED: dict[str, Any] = {
    "normalization": "RMSNorm", "activation_func": "torch.nn.functional.silu", "gated_linear_unit": True,
    "add_bias_linear": False, "position_embedding_type": "rope", "share_embeddings_and_output_weights": False,
    "seq_length": 4096,
}  # fmt: skip
LLAMA3 = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
"""Settings of a llama with the frequencies of Llama 3.1, and NeMo's values where a checkpoint has none."""
_QWEN2 = _GATED | {
    "add_qkv_bias": True, "vocab_size": 151936, "layernorm_epsilon": 1e-6, "rotary_base": 1e6,
}  # fmt: skip
_QWEN3 = _QWEN2 | {
    "add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 128, "num_query_groups": 8,
    "max_position_embeddings": 40960,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": _GATED,
    "Llama31Config": _GATED | LLAMA3 | {"num_query_groups": 8},
    "Qwen2Config": _QWEN2,
    "Qwen3Config": _QWEN3,
    "Qwen3MoEConfig": _QWEN3 | {"num_moe_experts": 128, "moe_router_topk": 8},
    "MistralConfig7B": _GATED | {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8,
        "ffn_hidden_size": 14336, "seq_length": 32768, "window_size": [4096, 0],
    },
    "MixtralConfig8x7B": _GATED | {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8,
        "ffn_hidden_size": 14336, "max_position_embeddings": 4096, "rotary_base": 1e6, "num_moe_experts": 8,
        "moe_router_topk": 2, "bf16": True,
    },
    "NemotronConfig": _GATED | {
        "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "gated_linear_unit": False,
        "activation_func": "nemo.collections.llm.fn.activation.squared_relu", "rotary_percent": 0.5, "num_layers": 32,
        "hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24, "num_query_groups": 8,
        "kv_channels": 128,
    },
}  # fmt: skip
"""Class of settings as NeMo's importers use it -> the values that it has where io.json has none (a test with
nemo-toolkit compares them). Of other classes `context/model.yaml` has them."""


@dataclass(frozen=True)
class NemoModel:
    """A class of models of NeMo, and the family here that it computes."""

    family: str
    with_experts: str | None
    """Family of the same class when its settings have experts."""
    positions: str = "seq_length"
    """Which of its settings NeMo's own export takes for the length that a model is made for."""


MODELS = {
    "LlamaModel": NemoModel("llama", None),
    "MistralModel": NemoModel("mistral", None),
    "Qwen2Model": NemoModel("qwen2", None),
    "Qwen3Model": NemoModel("qwen3", "qwen3_moe", "max_position_embeddings"),
    "NemotronModel": NemoModel("nemotron", None),
    "MixtralModel": NemoModel("mixtral", "mixtral", "max_position_embeddings"),
}
"""Class of models in `nemo.collections.llm` -> what it is here."""

_LAYERS = {"default_layer_spec", "transformer_engine_layer_spec", "local_layer_spec"}
"""Functions of NeMo that make a layer as Megatron-Core has it."""


@dataclass(frozen=True)
class NemoSettings:
    """What a checkpoint says of its model."""

    where: str
    model: str
    """Class of the model."""
    values: dict[str, Any]
    """The model's settings, which have Megatron-Core's names."""


def read_nemo_settings(folder: Path) -> NemoSettings | None:
    """Return what `folder/context` says of the model; None where there is no `io.json`.

    Settings in `io.json` count; those it lacks are those of `model.yaml`, or else of `CONFIGS`.

    Raises:
        CheckpointError: a file cannot be read, or names a class that is not known.
    """
    path = folder / CONTEXT / IO
    if not path.is_file():
        return None
    refuse_large_config(path)
    objects = _Objects(path)
    model = objects.at(objects.root, "model")
    if (name := objects.class_of(model)) not in MODELS:
        raise CheckpointError(
            f"{path}: a model of class {name} is not supported; use one of {', '.join(MODELS)}, or fetch it as a "
            "Hugging Face folder."
        )
    config = objects.at(model, "config")
    kind, known = objects.class_of(config), _read_yaml(path.with_name(YAML))
    if known is None and kind not in CONFIGS:
        raise CheckpointError(
            f"{path}: settings of class {kind} are known with {YAML} beside it alone, which is missing; fetch it, or "
            "set model.hf_assets."
        )
    values = CONFIGS.get(kind, {}) | (known or {}) | objects.values(config)
    layer = str(values.get("transformer_layer_spec") or "default_layer_spec").rpartition(".")[2]
    if layer not in _LAYERS:
        raise CheckpointError(f"{path}: transformer_layer_spec={layer} is not supported; only NeMo's own layers are.")
    return NemoSettings(str(path), name, values)


def _read_yaml(path: Path) -> dict[str, Any] | None:
    """Return the settings in `model.yaml`, as plain values; None where there is none."""
    if not path.is_file():
        return None
    import yaml

    refuse_large_config(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))["config"]
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is damaged ({reason}); fetch it again, or set model.hf_assets.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} has no section `config`; fetch it again, or set model.hf_assets.")
    return {str(key): _named(value) for key, value in config.items() if key != "_target_"}


def _named(value: Any) -> Any:
    """Return the name of a class or function in place of what stands for it."""
    return str(value.get("_target_")) if isinstance(value, dict) else value


class _Objects:
    """The objects of an `io.json`, by their keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            self.objects, self.root = text["objects"], text["root"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(f"{type(error).__name__}: {error}") from None
        if not isinstance(self.objects, dict):
            raise self.damaged("no objects")

    def damaged(self, reason: str) -> CheckpointError:
        short = " ".join(reason.split())[:200]
        return CheckpointError(f"{self.path} is damaged ({short}); fetch it again, or set model.hf_assets.")

    def object_of(self, reference: Any) -> dict[str, Any]:
        """Return what a reference leads to."""
        found = self.objects.get(reference.get("key")) if _is(reference, "ref") else None
        if not isinstance(found, dict) or not isinstance(found.get("items"), list):
            raise self.damaged(f"{str(reference)[:60]} leads to no object")
        return found

    def items(self, reference: Any) -> dict[str, Any]:
        """Return the attributes of an object, or the places of a list, by name or number."""
        pairs: dict[str, Any] = {}
        for item in self.object_of(reference)["items"]:
            if not isinstance(item, list) or len(item) != 2:
                raise self.damaged("an item is no pair")
            match = re.fullmatch(r"Attr\(name='(\w+)'\)|Index\(index=(\d+)\)", str(item[0]))
            if match:
                pairs[match[1] or match[2]] = item[1]
        return pairs

    def at(self, reference: Any, name: str) -> Any:
        """Return a reference to an attribute that is an object."""
        found = self.items(reference).get(name)
        if not _is(found, "ref"):
            raise self.damaged(f"no {name}")
        return found

    def class_of(self, reference: Any) -> str:
        """Return the name of the class that a described object would have."""
        metadata = self.object_of(reference).get("metadata")
        kind = self.items(metadata).get("fn_or_cls") if _is(metadata, "ref") else None
        return str(kind.get("name")) if _is(kind, "pyref") else "?"

    def values(self, reference: Any) -> dict[str, Any]:
        """Return the attributes of an object as plain values."""
        return {name: self.plain(value) for name, value in self.items(reference).items()}

    def plain(self, value: Any) -> Any:
        """Return a value; for a class or function its name, for any object but a list that of its class."""
        if not isinstance(value, dict):
            return value
        if _is(value, "leaf"):
            return value.get("value")
        if _is(value, "pyref"):
            return f"{value.get('module')}.{value.get('name')}"
        kind = self.object_of(value).get("type")
        if _is(kind, "pyref") and kind["name"] in ("list", "tuple"):
            leaves = [item for item in self.items(value).values()]
            return [leaf.get("value") if _is(leaf, "leaf") else str(leaf)[:60] for leaf in leaves]
        return self.class_of(value)


def _is(value: Any, kind: str) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and value.get("type") == kind


def dims_of_nemo(settings: NemoSettings, tokenizer: Path, vocab_size: int | None = None) -> Dims:
    """Return the architecture of a NeMo 2 checkpoint.

    Where the settings have no size of the vocabulary, as those of Mistral, Mixtral and Nemotron, NeMo pads the rows of
    the tokenizer's. A window is read as NeMo's own import and export do, which put the window of the Hugging Face
    config into Megatron's.

    Args:
        tokenizer: Folder of the tokenizer.
        vocab_size: Taken where the settings have none; None reads the tokenizer.
    Raises:
        CheckpointError: a setting is missing, no number, or one that no family here computes.
    """
    model, values = MODELS[settings.model], dict(settings.values)
    family = model.with_experts if values.get("num_moe_experts") and model.with_experts else model.family
    values["seq_length"] = values.get(model.positions) or values.get("seq_length")
    if values.get("vocab_size") is None:
        values["vocab_size"] = vocab_size or _num_tokens(tokenizer)
    window = values.get("window_size")
    if isinstance(window, list) and window and type(window[0]) is int:
        values["window_size"] = [window[0] - 1, *window[1:]]
    if family in ("mixtral", "qwen3_moe") and values.get("moe_ffn_hidden_size") is None:
        values["moe_ffn_hidden_size"] = values.get("ffn_hidden_size")
    dims = dims_of_settings(values, settings.where, family)
    if values.get("scale_factor") is None:
        return dims
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = dict(zip(names, (values.get(name, LLAMA3[name]) for name in LLAMA3), strict=True))
    scaled = replace(dims, rope_scaling={"rope_type": "llama3"} | scaling)
    if quick_dims(config_values(scaled)) != scaled:
        raise CheckpointError(f"{settings.where}: frequencies of {scaling} are not supported for a {dims.family}.")
    return scaled


def _num_tokens(folder: Path) -> int:
    """Return how many entries a tokenizer has, with those that were added, from its file."""
    path = folder / "tokenizer.json"
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = text["model"]["vocab"]
        words = set(vocabulary) if isinstance(vocabulary, dict) else {word for word, _ in vocabulary}
        return len(words | {token["content"] for token in text.get("added_tokens") or ()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not tell the size of the vocabulary ({type(error).__name__}), and the checkpoint's settings "
            "do not; set model.hf_assets to a folder with config.json and tokenizer."
        ) from None


def nemo_name(family: str) -> str | None:
    """Return NeMo's class of a family's models; None where it has none."""
    assert family in FAMILIES
    return next((name for name, model in MODELS.items() if family in (model.family, model.with_experts)), None)
