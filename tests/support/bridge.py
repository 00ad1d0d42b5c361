"""Megatron-Bridge, where `make test-bridge` has put it, and tiny models that it and we write."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedTokenizerFast

from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.checkpoint_metadata import read_metadata
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.models.parameters import parameter_shapes
from tests.support.tiny_models import VOCAB, save_tiny

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "bridge" / "golden.json"
ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
"""The only llama3 rope of Megatron-Core, beside its factor."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied_llama3_rope": ("llama_tied_llama3_rope", {"rope_parameters": ROPE}),
    "mistral_window": ("mistral_window", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2_tied", {}),
    "qwen3": ("qwen3", {}),
    "nemotron": ("nemotron", {}),
    "qwen3_moe": ("qwen3_moe", {"attention_bias": False}),
}
"""Name -> a case of `tiny_models`, and what Megatron-Bridge needs otherwise in it."""


def make_source(name: str, folder: Path) -> tuple[Dims, ParameterSource]:
    """Write a case of `CASES` as a Hugging Face folder that transformers 4 reads too, with a tokenizer."""
    return make_folder(*CASES[name], folder)


def make_folder(case: str, changes: dict[str, Any], folder: Path) -> tuple[Dims, ParameterSource]:
    """Write a case of `tiny_models` with these changes, as `make_source`."""
    made = folder.with_name(f"{folder.name}-of-transformers-5")
    save_tiny(case, made, **changes)
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(made)
    dims, source = open_hf(made)
    export_hf(made, folder, dims, source, torch.float32)
    return open_hf(folder)


def pruned(dims: Dims) -> tuple[Dims, ParameterSource]:
    """A model of that family with other sizes on every axis, heads that do not divide its width, random weights."""
    small = replace(
        dims, num_layers=3, hidden_size=40, ffn_hidden_size=dims.ffn_hidden_size - 8, num_heads=3, num_query_groups=1
    )
    small = replace(small, num_experts=3) if dims.num_experts else small
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(small).items()}
    return small, weights.__getitem__


def bridge_python() -> Path:
    """The Python that has Megatron-Bridge; skips the test where there is none."""
    python = Path(os.environ.get("COMPACTLM_BRIDGE", ROOT / ".venv-bridge" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"needs Megatron-Bridge in {python}: make test-bridge")
    return python


def run_bridge(jobs: list[list[str]], folder: Path) -> None:
    """Let Megatron-Bridge do a list of jobs (tests/bridge/tool.py)."""
    python = bridge_python()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join([str(ROOT / "tests" / "bridge" / "stand_in"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(
        [str(python), str(ROOT / "tests" / "bridge" / "tool.py"), str(folder / "jobs.json")],
        capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a `torch_dist` folder by torch's own reader, which shares no code with ours."""
    stored = read_metadata(checkpoint).state_dict_metadata
    empty = {
        key: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for key, tensor in stored.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(empty, checkpoint_id=checkpoint, no_dist=True)
    return empty


def written(checkpoint: Path, settings: list[str]) -> dict[str, Any]:
    """What is in a checkpoint: tensors, states by the shape that their numbers count, settings, and what is beside."""
    stored = read_metadata(checkpoint).state_dict_metadata
    tensors = {key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}
    numbers: dict[tuple[str, str], set[str]] = {}
    for key in stored.keys() - tensors.keys():
        name, _, (number, shape) = *key.partition("/shard_")[:2], key.partition("/shard_")[2].split("_")
        numbers.setdefault((name, shape), set()).add(number)
    for (name, shape), found in numbers.items():
        assert found == {".".join(map(str, at)) for at in product(*map(range, map(int, shape.split("."))))}, name
    model = yaml.safe_load((checkpoint / "run_config.yaml").read_text())["model"]
    state = torch.load(checkpoint / "train_state.pt", weights_only=True)
    return {
        "tensors": {key: [str(tensor.properties.dtype), *tensor.size] for key, tensor in sorted(tensors.items())},
        "states": {name: shape for name, shape in sorted(numbers)},
        "model": {name: model.get(name) for name in settings},
        "beside": {
            "common.pt": torch.load(checkpoint / "common.pt", weights_only=True),
            "train_state.pt": {name: [str(value.dtype), float(value)] for name, value in sorted(state.items())},
            "metadata.json": json.loads((checkpoint / "metadata.json").read_text()),
        },
    }
