"""Checkpoints of NeMo 2: what their context says, read as data, and what we write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compactlm_nemo.config.model import ModelConfig
from compactlm_nemo.errors import CheckpointError, ConfigError, NumericsError
from compactlm_nemo.models.bridge import count_bridge
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER, dims_of
from compactlm_nemo.models.nemo import export_nemo, nemo_problem, nemo_settings, untied_for_nemo
from compactlm_nemo.models.nemo_config import CONFIGS, NemoSettings, dims_of_nemo
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.models.source import generated_config, open_teacher, quick_source_dims, teacher_dims
from compactlm_nemo.search.cost import num_params
from tests.support.bridge import pruned
from tests.support.nemo import CASES, FORGOTTEN, GOLDEN, described, make_source, written
from tests.support.tiny_models import CASES as EVERY_CASE
from tests.support.tiny_models import VOCAB, tiny_config

GOLDENS = json.loads(GOLDEN.read_text())
OURS: dict[str, dict[str, Any]] = {
    # NeMo's import forgets where the frequencies of Llama 3.1 change, and the length of some families.
    "llama_tied_llama3_rope": {"old_context_len": 64},
    "qwen3": {"seq_length": 512, "max_position_embeddings": 512},
    "qwen3_tied": {"seq_length": 512, "max_position_embeddings": 512},
    "mistral_window": {"seq_length": 512},
    # It keeps the width that config.json tells of an MLP, where every layer has experts.
    "qwen3_moe": {"seq_length": 512, "max_position_embeddings": 512, "ffn_hidden_size": 24},
}
"""Case -> the settings that we write otherwise than NeMo 2.7.3."""


def _write(case: str, folder: Path) -> tuple[Dims, Callable[[str], torch.Tensor]]:
    dims, source = make_source(case, folder / "hf")
    export_nemo(folder / "hf", folder / "nemo", dims, source, torch.float32, 0)
    return dims, source


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as Hugging Face folder and as the checkpoint that we write of it."""
    folder = tmp_path_factory.mktemp("llama")
    _write("llama", folder)
    return folder


def _copy(made: Path, folder: Path) -> Path:
    return Path(shutil.copytree(made / "nemo", folder / "copy"))


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_nemo_writes(case: str, tmp_path: Path) -> None:
    """golden.json is what NeMo 2.7.3 wrote of these models; `tests/nemo` compares it with NeMo itself.

    Of the settings those count that both write; NeMo writes others too, with their defaults, and leaves the head size
    of Qwen and the size of the vocabulary to others.
    """
    golden = GOLDENS["checkpoints"][case]
    dims, _ = _write(case, tmp_path)
    got = written(tmp_path / "nemo", set(nemo_settings(dims, torch.float32)))
    want, theirs = golden["described"], golden["described"]["values"]
    both = {name: theirs[name] for name in got["described"]["values"].keys() & theirs.keys()}
    ours = OURS.get(case, {}) | {"make_vocab_size_divisible_by": 1}
    assert {name: got["described"]["values"][name] for name in both} == both | {k: ours[k] for k in ours.keys() & both}
    assert {k: v for k, v in got["described"].items() if k != "values"} == {
        k: v for k, v in want.items() if k != "values"
    }
    rows = {key: [dtype, VOCAB, *size[1:]] for key, (dtype, *size) in golden["tensors"].items() if _is_vocab(key)}
    assert got["tensors"] == golden["tensors"] | rows, "but for the padding of Mixtral's vocabulary"
    for name in ("states", "numbers", "metadata"):
        assert got[name] == golden[name], name


def _is_vocab(key: str) -> bool:
    return key.removeprefix("module.") in (EMBEDDING, OUTPUT_LAYER)


@pytest.mark.parametrize("case", CASES)
def test_what_nemo_says_of_a_model_is_its_architecture(case: str, tmp_path: Path) -> None:
    """With the default values of NeMo's classes, which are part of the golden file."""
    told = GOLDENS["checkpoints"][case]["described"]
    kind = told["settings"].rpartition(".")[2]
    defaults = {name: value for name, value in GOLDENS["defaults"][kind].items()}
    settings = NemoSettings("io.json", told["model"].rpartition(".")[2], defaults | told["values"])
    want = dims_of(tiny_config(CASES[case].case, **CASES[case].changes))
    assert vars(dims_of_nemo(settings, tmp_path, VOCAB)) == vars(want) | FORGOTTEN.get(case, {})


def test_the_default_values_are_those_of_nemos_classes() -> None:
    assert GOLDENS["defaults"] == CONFIGS


@pytest.mark.parametrize("case", [*CASES, "qwen2_tied_pruned", "nemotron_pruned", "qwen3_moe_pruned"])
@pytest.mark.parametrize("has_yaml", [True, False])
def test_a_checkpoint_comes_back_without_companions(case: str, has_yaml: bool, tmp_path: Path) -> None:
    dims, source = make_source(case.removesuffix("_pruned"), tmp_path / "hf")
    if case.endswith("_pruned"):
        dims, source = pruned(dims)
        dims = replace(dims, experts_per_token=min(2, dims.experts_per_token))
    export_nemo(tmp_path / "hf", tmp_path / "nemo", dims, source, torch.float32, 0)
    if not has_yaml:
        (tmp_path / "nemo" / "context" / "model.yaml").unlink()
    cfg = ModelConfig(source=str(tmp_path / "nemo"))
    held, weights = open_teacher(cfg)
    assert held == untied_for_nemo(dims) == quick_source_dims(cfg) == teacher_dims(cfg)
    for name in parameter_shapes(dims):
        assert torch.equal(weights(name), source(name)), name
    if not held.tied_embeddings and dims.tied_embeddings:
        assert torch.equal(weights(OUTPUT_LAYER), source(EMBEDDING))
    assert count_bridge(tmp_path / "nemo") == num_params(held)
    config = generated_config(cfg, held)
    assert config is not None and config["dtype"] == "float32" and config["model_type"] == dims.family


def test_companions_that_tell_otherwise_are_refused(made: Path, tmp_path: Path) -> None:
    cfg = ModelConfig(source=str(made / "nemo"), hf_assets=str(made / "hf"))
    assert open_teacher(cfg)[0] == open_teacher(ModelConfig(source=str(made / "nemo")))[0]
    other = Path(shutil.copytree(made / "hf", tmp_path / "other"))
    values = json.loads((other / "config.json").read_text())
    values["rope_parameters"]["rope_theta"] = values["rope_theta"] = 5e5
    (other / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="rope_theta 500000.0 but rotary_base 10000.0"):
        open_teacher(replace(cfg, hf_assets=str(other)))


def test_what_the_description_names_is_not_made(made: Path, tmp_path: Path) -> None:
    """`load_context` would import and call it."""
    folder = _copy(made, tmp_path)
    path = folder / "context" / "io.json"
    text = path.read_text()
    for old, new, words in (
        ('"LlamaModel"', '"system"', "a model of class system is not supported"),
        ('"LlamaConfig"', '"system"', "settings of class system are known with model.yaml"),
        ('"key": "config_1"', '"key": "gone"', "leads to no object"),
        ("\"Attr(name='config')\"", "\"Attr(name='x')\"", "no config"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        (folder / "context" / "model.yaml").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=words) as raised:
            open_teacher(ModelConfig(source=str(folder)))
        assert "\n" not in str(raised.value)
    for damaged in (
        "",
        "[]",
        "{}",
        '{"objects": [], "root": 1}',
        '{"objects": {}, "root": {"type": "ref", "key": "a"}}',
    ):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            open_teacher(ModelConfig(source=str(folder)))


def test_a_checkpoint_without_tokenizer_or_description_asks_for_companions(made: Path, tmp_path: Path) -> None:
    folder = _copy(made, tmp_path)
    shutil.rmtree(folder / "context" / "nemo_tokenizer")
    cfg = ModelConfig(source=str(folder))
    with pytest.raises(ConfigError, match="has no tokenizer in .*nemo_tokenizer; set model.hf_assets"):
        from compactlm_nemo.models.source import hf_assets_folder

        hf_assets_folder(cfg)
    (folder / "context" / "io.json").unlink()
    with pytest.raises(ConfigError, match="without config.json and tokenizer; set model.hf_assets"):
        open_teacher(cfg)


def test_settings_that_no_model_here_computes_are_refused(made: Path, tmp_path: Path) -> None:
    folder = _copy(made, tmp_path)
    path = folder / "context" / "model.yaml"
    values = json.loads(path.read_text())
    for changes, words in (
        ({"qk_l2_norm": True}, "model.qk_l2_norm=True is not supported"),
        ({"transformer_layer_spec": {"_target_": "x.own_spec"}}, "transformer_layer_spec=own_spec is not supported"),
        ({"num_moe_experts": 4}, "no model that is supported"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid' is not supported"),
    ):
        path.write_text(json.dumps(values | {"config": values["config"] | changes}))
        with pytest.raises(CheckpointError, match=words):
            open_teacher(ModelConfig(source=str(folder)))
    path.write_text("config: [")
    with pytest.raises(CheckpointError, match="model.yaml is damaged"):
        open_teacher(ModelConfig(source=str(folder)))


def test_the_vocabulary_is_the_tokenizers_where_nemo_says_nothing(made: Path, tmp_path: Path) -> None:
    folder = _copy(made, tmp_path)
    (folder / "context" / "model.yaml").unlink()
    path = folder / "context" / "io.json"
    text = json.loads(path.read_text())
    for described_object in text["objects"].values():
        described_object["items"] = [item for item in described_object["items"] if "vocab_size" not in item[0]]
    path.write_text(json.dumps(text))
    assert open_teacher(ModelConfig(source=str(folder)))[0].vocab_size == VOCAB
    (folder / "context" / "nemo_tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="does not tell the size of the vocabulary"):
        open_teacher(ModelConfig(source=str(folder)))


REFUSED = {
    "llama_biases": "exports no llama with biases",
    "llama_attention_bias": "exports no llama with biases",
    "llama_mlp_bias": "exports no llama with biases",
    "qwen3_attention_bias": "exports no qwen3 with biases",
    "nemotron_tied_biases": "exports no nemotron with biases",
    "mixtral": "exports no mixtral with a window",
    "qwen2_moe": "has no qwen2_moe, only llama",
    "qwen3_moe": "exports no qwen3_moe with biases",
    "qwen3_moe_tied_top1": "norm_topk_prob=true alone",
}


@pytest.mark.parametrize("case", EVERY_CASE)
def test_what_nemo_cannot_hold_is_refused_with_the_reason(case: str) -> None:
    dims = dims_of(tiny_config(case))
    problem = nemo_problem(dims)
    if case in REFUSED:
        assert problem is not None and REFUSED[case] in problem
    elif dims.family in ("llama", "mistral", "qwen2", "qwen3", "nemotron", "mixtral", "qwen3_moe"):
        assert problem is None
    else:
        assert problem is not None and f"has no {dims.family}, only" in problem


@pytest.mark.parametrize("kind", ["linear", "yarn", "longrope"])
def test_frequencies_that_nemo_has_not_are_refused(kind: str) -> None:
    dims = replace(dims_of(tiny_config("llama")), rope_scaling={"rope_type": kind, "factor": 2.0})
    assert f"has no llama with rope_type={kind}" in str(nemo_problem(dims))


def test_a_head_of_its_own_is_written_for_families_that_nemo_never_ties(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dims, _ = _write("qwen2_tied", tmp_path)
    assert dims.tied_embeddings and "NeMo 2 exports no tied qwen2" in caplog.text
    assert described(tmp_path / "nemo")["values"]["share_embeddings_and_output_weights"] is False
    caplog.clear()
    _write("qwen3_tied", tmp_path / "other")
    assert not caplog.text


def test_a_weight_that_is_not_finite_is_not_written(made: Path, tmp_path: Path) -> None:
    dims, source = open_teacher(ModelConfig(source=str(made / "nemo")))
    with pytest.raises(NumericsError, match="is not finite as torch.float16"):
        export_nemo(made / "hf", tmp_path / "nemo", dims, lambda name: source(name) * 1e6, torch.float16, 0)
