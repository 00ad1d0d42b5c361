"""Checkpoints of Megatron-Bridge: what their settings say, which of them is read, and what we write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compactlm_nemo.config.export import ExportConfig, ExportFormat
from compactlm_nemo.config.model import ModelConfig
from compactlm_nemo.errors import CheckpointError, ConfigError, NumericsError
from compactlm_nemo.models.bridge import bridge_problem, count_bridge, export_bridge
from compactlm_nemo.models.bridge_config import FAMILIES_OF_SETTINGS, dims_of_settings, read_model_settings
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.models.hf_config import config_values, quick_dims
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.models.source import find_weights, generated_config, open_teacher, quick_source_dims, teacher_dims
from tests.support.bridge import CASES, GOLDEN, make_source, tensors_of, written
from tests.support.tiny_models import CASES as EVERY_CASE
from tests.support.tiny_models import tiny_config

GOLDENS = json.loads(GOLDEN.read_text())
OURS: dict[str, dict[str, Any]] = {
    # Bridge 0.3.1 writes sliding_window as it is, and so lets a query see one token more than the model does.
    "mistral_window": {"window_size": [6, 0]},
    # A layer with experts has no MLP beside them; Bridge keeps the width that config.json tells of one.
    "qwen3_moe": {"ffn_hidden_size": 24},
    # The same function by another name, which does not hang on Bridge's module of that family.
    "nemotron": {"activation_func": {"_target_": "megatron.core.activations.squared_relu", "_call_": False}},
}
"""Case -> the settings that we write otherwise than Bridge 0.3.1."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as Hugging Face folder and as the checkpoint that we write of it."""
    return _write("llama", tmp_path_factory.mktemp("llama"))


def _write(case: str, folder: Path) -> Path:
    dims, source = make_source(case, folder / "hf")
    export_bridge(folder / "hf", folder / "bridge", dims, source, torch.float32, 2**32)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_bridge_writes(case: str, tmp_path: Path) -> None:
    """golden.json is what Megatron-Bridge 0.3.1 wrote of these models; `tests/bridge` compares it with Bridge itself.

    Of the settings those count that we write; Bridge writes the others too, with their defaults.
    """
    golden = GOLDENS[case]
    folder = _write(case, tmp_path) / "bridge"
    settings = yaml.safe_load((folder / "iter_0000000" / "run_config.yaml").read_text())
    names = sorted(settings["model"].keys() - {"_target_"})
    want = golden | {"model": {name: golden["model"][name] for name in names} | OURS.get(case, {})}
    assert written(folder / "iter_0000000", names) == want
    assert settings["model"]["_target_"] == "megatron.bridge.models.gpt_provider.GPTModelProvider"
    assert settings["checkpoint"] == {"save_rng": False, "save_optim": False, "fully_parallel_save": True}
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "0"
    for name in ("latest_train_state.pt", "iter_0000000/tokenizer/tokenizer.json", "hf/config.json"):
        assert (folder / name).is_file(), name


@pytest.mark.parametrize("case", CASES)
def test_what_bridge_says_of_a_model_is_its_architecture(case: str) -> None:
    name, changes = CASES[case]
    want = dims_of(tiny_config(name, **changes))
    if case == "mistral_window":  # one more than `window_size`, which the golden one of 0.3.1 has one too high
        want = replace(want, window=8)
    assert dims_of_settings(GOLDENS[case]["model"]) == want


@pytest.mark.parametrize("case", [case for case in EVERY_CASE if tiny_config(case).model_type in FAMILIES_OF_SETTINGS])
def test_a_generated_config_says_the_architecture(case: str) -> None:
    dims = dims_of(tiny_config(case))
    assert quick_dims(config_values(dims)) == dims


def test_weights_come_back_bit_by_bit_and_each_is_read_once(tmp_path: Path) -> None:
    """Also in the number format that is asked for; the reference is torch's own reader."""
    dims, source = make_source("qwen3_moe", tmp_path / "hf")
    asked: list[str] = []

    def counted(name: str) -> torch.Tensor:
        asked.append(name)
        return source(name)

    count = export_bridge(tmp_path / "hf", tmp_path / "bridge", dims, counted, torch.bfloat16, 2**32)
    assert sorted(asked) == sorted(parameter_shapes(dims))
    stored = tensors_of(tmp_path / "bridge" / "iter_0000000")
    assert count == count_bridge(tmp_path / "bridge") == sum(tensor.numel() for tensor in stored.values())
    fc2 = stored["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
    assert torch.equal(fc2[2, 3], source("decoder.layers.2.mlp.experts.local_experts.3.linear_fc2.weight").bfloat16())
    cfg = ModelConfig(source=str(tmp_path / "bridge"))
    back, weights = open_teacher(cfg)
    assert back == dims == quick_source_dims(cfg)
    assert (generated_config(cfg, back) or {})["dtype"] == "bfloat16"
    for name in parameter_shapes(dims):
        assert torch.equal(weights(name), source(name).bfloat16()), name


def test_a_weight_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    dims, source = make_source("llama", tmp_path / "hf")
    with pytest.raises(NumericsError, match="is not finite as torch.float16"):
        export_bridge(tmp_path / "hf", tmp_path / "bridge", dims, lambda name: source(name) * 1e6, torch.float16, 2**32)


@pytest.mark.parametrize(
    "case, changes, words",
    [
        ("mixtral", {}, "has no mixtral, only llama"),
        ("qwen2_moe", {}, "has no qwen2_moe, only llama"),
        ("llama_attention_bias", {}, "has no llama with biases"),
        ("llama_mlp_bias", {}, "has no llama with biases"),
        ("qwen3_moe", {}, "has no qwen3_moe with biases"),
        ("llama_tied_llama3_rope", {}, "original_max_position_embeddings=8192 and no setting, the model 64"),
    ],
)
def test_what_bridge_cannot_hold_is_named(case: str, changes: dict[str, Any], words: str) -> None:
    problem = bridge_problem(dims_of(tiny_config(case, **changes)))
    assert problem is not None and words in problem and "\n" not in problem


def test_a_checkpoint_is_no_repository_of_the_hub() -> None:
    with pytest.raises(ConfigError, match="export.push=a/b needs export.format=hf, not bridge"):
        ExportConfig(format=ExportFormat.bridge, push="a/b")


# Which checkpoint is read.


def _checkpoints(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / ".metadata").write_bytes(b"")
    return root


@pytest.mark.parametrize(
    "tracker, want",
    [("7", "iter_0000007"), ("0000012\n", "iter_0000012"), ("release", "release"), (None, "iter_1000000")],
)
def test_the_tracker_names_the_checkpoint(tracker: str | None, want: str, tmp_path: Path) -> None:
    """Without one it is the largest number, which may have more digits than the others."""
    root = _checkpoints(tmp_path, "iter_0000007", "iter_0000012", "iter_1000000", "iter_999999", "iter_x", "release")
    if tracker is not None:
        (root / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert find_weights(root) == root / want
    assert find_weights(root / want) == root / want


def test_release_is_read_where_it_is_alone(tmp_path: Path) -> None:
    assert find_weights(_checkpoints(tmp_path, "release")) == tmp_path / "release"


@pytest.mark.parametrize(
    "tracker, words", [("13", "says 13, and .*iter_0000013 holds no"), ("../x", "says '../x'; it")]
)
def test_a_tracker_that_names_nothing_is_refused(tracker: str, words: str, tmp_path: Path) -> None:
    root = _checkpoints(tmp_path, "iter_0000012")
    (root / "latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(CheckpointError, match=words):
        find_weights(root)


# What config.json says otherwise.


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_theta": 5e5}, "rope_theta 500000.0 but rotary_base 10000.0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 but layernorm_epsilon 0.001"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True but share_embeddings_and_output_weights False"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling .*linear.* but rope_scaling None"),
        ({"vocab_size": 130}, "vocab_size 130 but vocab_size 131"),
        (
            {"rms_norm_eps": 1e-5, "num_key_value_heads": 4},
            "num_key_value_heads 4 but num_query_groups 2, rms_norm_eps 1e-05 but layernorm_epsilon 0.001; give the",
        ),
    ],
)
def test_a_config_that_says_otherwise_is_refused(
    changes: dict[str, Any], words: str, made: Path, tmp_path: Path
) -> None:
    values = config_values(teacher_dims(ModelConfig(source=str(made / "bridge"))))
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_teacher(ModelConfig(source=str(made / "bridge"), hf_assets=str(tmp_path)))
    assert "leave model.hf_assets out" in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_says_the_same_is_taken(made: Path, tmp_path: Path) -> None:
    """So is another length, which a training sets as it likes."""
    values = config_values(teacher_dims(ModelConfig(source=str(made / "bridge"))))
    (tmp_path / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 99}))
    cfg = ModelConfig(source=str(made / "bridge"), hf_assets=str(tmp_path))
    assert open_teacher(cfg)[0].max_position_embeddings == 99
    assert generated_config(cfg, open_teacher(cfg)[0]) is None


@pytest.mark.parametrize("window", [6, 7])
def test_a_window_of_either_version_of_bridge_goes_with_its_config(window: int, tmp_path: Path) -> None:
    """Version 0.3.1 writes `[sliding_window, 0]`, 0.6.2 `[sliding_window - 1, 0]`."""
    folder = _write("mistral_window", tmp_path)
    _set(folder / "bridge", {"window_size": [window, 0]})
    cfg = ModelConfig(source=str(folder / "bridge"), hf_assets=str(folder / "hf"))
    assert open_teacher(cfg)[0].window == 7
    assert open_teacher(ModelConfig(source=str(folder / "bridge")))[0].window == window + 1
    _set(folder / "bridge", {"window_size": [8, 0]})
    with pytest.raises(CheckpointError, match="sliding_window 7 but window_size 9"):
        open_teacher(cfg)


def _set(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "iter_0000000" / "run_config.yaml"
    values = yaml.safe_load(path.read_text())
    values["model"] |= settings
    path.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"multi_latent_attention": True}, "model.multi_latent_attention=True is not supported; it must be False"),
        ({"moe_layer_freq": [0, 1, 1, 1]}, "model.moe_layer_freq"),
        ({"position_embedding_type": "learned_absolute"}, "it must be 'rope'"),
        ({"normalization": "LayerNorm"}, "normalization=LayerNorm with layernorm_zero_centered_gamma=False"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "activation_func=torch.nn.functional.gelu"),
        ({"gated_linear_unit": False}, "with gated_linear_unit=False"),
        ({"num_layers": "4"}, "model.num_layers='4' must be a whole number"),
        ({"num_attention_heads": 0}, "model.num_attention_heads=0"),
        ({"vocab_size": None}, "model.vocab_size=None must be a whole number"),
        ({"rotary_base": "much"}, "model.rotary_base='much' must be a number"),
        ({"hidden_size": 2**40}, "is more than any model has"),
        ({"window_size": [7, 7]}, r"model.window_size=\[7, 7\]"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "no model that is supported"),
        ({"num_moe_experts": 4, "moe_router_topk": 9}, "no model that is supported"),
    ],
)
def test_settings_that_mean_another_model_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        dims_of_settings(GOLDENS["llama"]["model"] | changes, "run_config.yaml")
    assert "\n" not in str(caught.value)


def test_numbers_that_yaml_takes_for_texts_are_numbers() -> None:
    assert dims_of_settings(GOLDENS["llama"]["model"] | {"layernorm_epsilon": "1e-06"}).norm_eps == 1e-6


@pytest.mark.parametrize("text", ["model: [1", "model: 3", "", "a: 1"])
def test_settings_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="run_config.yaml .*; fetch it again, or set model.hf_assets"):
        read_model_settings(tmp_path)


def test_nothing_that_settings_name_is_made(tmp_path: Path) -> None:
    """Neither by YAML's tags, which end the reading, nor by `_target_`, which is not looked at."""
    (tmp_path / "run_config.yaml").write_text(f"model: !!python/object/apply:os.system ['touch {tmp_path}/ran']")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_model_settings(tmp_path)
    target = {"_target_": "os.system", "_args_": [f"touch {tmp_path}/ran"]}
    dims_of_settings(GOLDENS["llama"]["model"] | target | {"init_method": target})
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_tokenizer_asks_for_one(made: Path, tmp_path: Path) -> None:
    weights = tmp_path / "iter_0000003"
    weights.mkdir()
    for path in (made / "bridge" / "iter_0000000").iterdir():
        if path.is_file():
            (weights / path.name).write_bytes(path.read_bytes())
    from compactlm_nemo.models.source import hf_assets_folder

    with pytest.raises(ConfigError, match="has no tokenizer in .*iter_0000003/tokenizer; set model.hf_assets"):
        hf_assets_folder(ModelConfig(source=str(tmp_path)))
    (weights / "run_config.yaml").unlink()
    with pytest.raises(ConfigError, match="without config.json and tokenizer; set model.hf_assets"):
        hf_assets_folder(ModelConfig(source=str(tmp_path)))
