"""Folders that cannot be read: one CheckpointError each, one line that says what is wrong with which file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.families import EMBEDDING
from compactlm_nemo.models.hf import HFSource, open_hf
from tests.support.tiny_models import save_tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "llama"
    save_tiny("llama", folder)
    open_hf(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A fresh copy of a good folder, to be spoiled."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def _config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return spoil


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def _truncate(keep: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: int(len(data) * keep)])

    return spoil


def _lose_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    first = sorted(parts.values())[0]
    save_file({name: tensors[name] for name, part in parts.items() if part == first}, folder / first)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))


LAYER_0_UP = "model.layers.0.mlp.up_proj.weight"

BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing folder": (shutil.rmtree, ["does not exist"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
    "config is no json": (lambda folder: (folder / "config.json").write_text("{"), ["config.json cannot be read"]),
    "config is no object": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json cannot be read"]),
    "config of a wrong type": (_config(hidden_size="wide"), ["config.json", "hidden_size"]),
    "invented model_type": (_config(model_type="mamba9"), ["model_type=mamba9", "llama, mistral, qwen2"]),
    "other model_type": (_config(model_type="gpt2"), ["model_type=gpt2", "llama, mistral, qwen2"]),
    "a list of layers that is too short": (
        _config(model_type="smollm3", no_rope_layers=[1, 0], layer_types=["full_attention"] * 4, pad_token_id=None),
        ["no_rope_layers has 2 entries for 4 layers"],
    ),
    "a list of layers that transformers cannot complete": (
        _config(model_type="smollm3", no_rope_layers=[1, 0], pad_token_id=None),
        ["config.json cannot be read"],
    ),
    "unknown rotation": (
        _config(rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0}),
        ["rope_type='spiral'", "default, linear"],
    ),
    "unknown rotation in the older spelling": (
        _config(rope_parameters=None, rope_theta=10000.0, rope_scaling={"rope_type": "spiral"}),
        ["rope_type='spiral'", "default, linear"],
    ),
    "llama3 without its numbers": (
        _config(rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0}),
        ["config.json cannot be read", "low_freq_factor"],
    ),
    "partial rotation": (_config(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5", "must be 1.0"]),
    "gelu": (_config(hidden_act="gelu"), ["hidden_act='gelu'", "'silu'"]),
    "unknown setting": (_config(logit_scale=0.5), ["logit_scale=0.5 is not supported"]),
    "layer types": (_config(layer_types=["full_attention"] * 3 + ["sliding_attention"]), ["layer_types"]),
    "truncated data": (_truncate(0.5), ["model.safetensors is damaged", "fetch it again"]),
    "truncated header": (_truncate(0.001), ["model.safetensors is damaged", "fetch it again"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["no *.safetensors"]),
    "missing shard": (_lose_shard, ["lacks 1 of 2 shards", "model-00002-of-00002.safetensors"]),
    "damaged index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[1]"),
        ["index.json is damaged"],
    ),
    "missing tensor": (_weights(lambda t: t.pop(LAYER_0_UP)), ["lacks 1 tensors", LAYER_0_UP]),
    "more layers in config": (_config(num_hidden_layers=5), ["lacks 9 tensors", "model.layers.4."]),
    "unexplained tensor": (
        _weights(lambda t: t.update({"model.layers.0.adapter.weight": torch.zeros(2)})),
        ["1 tensors", "does not explain", "model.layers.0.adapter.weight"],
    ),
    "biases without the setting": (
        _weights(lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)})),
        ["does not explain", "model.layers.1.self_attn.q_proj.bias"],
    ),
    "other width": (_config(intermediate_size=96), ["mlp.gate_proj.weight", "[80, 48]", "[96, 48]"]),
    "other head size": (_config(head_dim=8), ["self_attn.q_proj.weight", "[64, 48]", "[32, 48]"]),
    "other groups": (_config(num_key_value_heads=4), ["self_attn.k_proj.weight", "[32, 48]", "[64, 48]"]),
    "other vocabulary": (_config(vocab_size=132), ["model.embed_tokens.weight", "[131, 48]", "[132, 48]"]),
    # The rows of q, k and v add up to the right number: only the check of each file's header sees it.
    "one head moved from q to k": (
        _weights(
            lambda t: t.update(
                {
                    "model.layers.2.self_attn.q_proj.weight": torch.zeros(48, 48),
                    "model.layers.2.self_attn.k_proj.weight": torch.zeros(48, 48),
                }
            )
        ),
        ["model.layers.2.self_attn.q_proj.weight", "[48, 48]", "[64, 48]"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_useful_line(case: str, folder: Path) -> None:
    spoil, words = BROKEN[case]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        open_hf(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message


def test_qwen_window_behind_its_switch_is_refused(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path, use_sliding_window=True, max_window_layers=0)
    with pytest.raises(CheckpointError, match="use_sliding_window=True"):
        open_hf(tmp_path)


def test_a_second_copy_under_other_names_is_not_read(folder: Path) -> None:
    """As in repositories that keep `consolidated.safetensors` beside the Hugging Face files."""
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    open_hf(folder)


def test_checks_read_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(HFSource, "__call__", fail)
    open_hf(folder)


def test_a_tied_model_with_an_output_layer_of_its_own_is_refused_and_a_copy_accepted(tmp_path: Path) -> None:
    """A merged adapter leaves `tie_word_embeddings: true` beside a head that was trained."""
    folder = tmp_path / "model"
    save_tiny("qwen2_tied", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    _, copied = open_hf(folder)
    assert torch.equal(copied(EMBEDDING), tensors["lm_head.weight"])
    tensors["lm_head.weight"][-1, -1] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    _, differing = open_hf(folder)
    with pytest.raises(CheckpointError, match="tie_word_embeddings=true; set that to false to keep both, or delete"):
        differing(EMBEDDING)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="differs from its embedding"):
        open_hf(folder)[1](EMBEDDING)
