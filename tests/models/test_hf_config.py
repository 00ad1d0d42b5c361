"""The quick look at a config says what transformers says, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compactlm_nemo.config.load import CONF, compose
from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.families import FAMILIES, dims_of, resized
from compactlm_nemo.models.hf import export_hf, open_hf, read_config
from compactlm_nemo.models.hf_config import DEFAULTS, quick_dims, quick_folder_dims
from compactlm_nemo.models.limits import export_problem
from compactlm_nemo.models.source import declared_dims, quick_source_dims
from tests.support.tiny_models import CASES, EAGER, save_tiny, tiny_config, tokens


def test_every_family_has_defaults() -> None:
    assert DEFAULTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"hidden_size": 1024, "num_attention_heads": 8},
        {"num_key_value_heads": 2, "head_dim": 32},
        {"vocab_size": 99},
    ],
)
def test_what_is_left_out_is_as_in_transformers(family: str, values: dict[str, Any]) -> None:
    if FAMILIES[family].latents:  # with keys of its own for every head; V2's experts of a token have no default
        heads = {"num_key_value_heads": values["num_attention_heads"]} if "num_attention_heads" in values else {}
        values = {key: x for key, x in values.items() if key != "num_key_value_heads"} | heads
        values |= {"num_experts_per_tok": 6}
    assert quick_dims({"model_type": family} | values) == dims_of(AutoConfig.for_model(family, **values))


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_read_alike(case: str, tmp_path: Path) -> None:
    save_tiny(case, tmp_path)
    assert quick_folder_dims(tmp_path) == dims_of(read_config(tmp_path))


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_an_experiment_is_read_alike(experiment: str) -> None:
    cfg = compose([f"experiment={experiment}", "model.source=absent"]).model
    assert quick_source_dims(cfg) == declared_dims(cfg)


@pytest.mark.parametrize(
    "values",
    [
        {}, {"model_type": "gpt2"}, {"model_type": "llama", "logit_scale": 0.5},
        {"model_type": "llama", "hidden_size": "wide"}, {"model_type": "llama", "hidden_act": "gelu"},
        {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"model_type": "qwen2", "use_sliding_window": True}, [], None, 3,
    ],
)  # fmt: skip
def test_what_is_not_certain_is_left_to_transformers(values: Any, tmp_path: Path) -> None:
    assert quick_dims(values) is None
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert quick_folder_dims(tmp_path) is None


@pytest.mark.parametrize("size", ["wide", 4096.0, None, True])
def test_a_size_that_is_no_whole_number_is_named(size: Any) -> None:
    """Versions of transformers that check types refuse it before; 5.2 does not."""
    config = SimpleNamespace(**DEFAULTS["llama"], model_type="llama", to_diff_dict=dict)
    assert dims_of(config).hidden_size == 4096
    config.hidden_size = size
    with pytest.raises(CheckpointError, match=f"hidden_size={size!r} must be a whole number"):
        dims_of(config)


@pytest.mark.parametrize("content", ["", "{", "\udcff"])
def test_a_damaged_file_is_left_to_transformers(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert quick_folder_dims(tmp_path) is None
    assert quick_folder_dims(tmp_path / "nowhere") is None


NOTES = {"unsloth_fixed": True, "_attn_implementation_autoset": True, "tokenizer_class": "X", "max_sequence_length": 9}


def test_notes_of_other_tools_pass_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Keys that no model of transformers reads have no effect; those that some model reads stay refused."""
    save_tiny("llama", tmp_path)
    plain = quick_folder_dims(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | NOTES))
    with caplog.at_level("WARNING"):
        assert quick_folder_dims(tmp_path) == dims_of(read_config(tmp_path)) == plain is not None
    (line,) = [record.getMessage() for record in caplog.records if "notes of other tools" in record.getMessage()]
    assert all(key in line for key in NOTES)
    for key, value in (("logit_scale", 0.5), ("quantization_config", {"bits": 4}), ("final_logit_softcapping", 30.0)):
        (tmp_path / "config.json").write_text(json.dumps(text | NOTES | {key: value}))
        assert quick_folder_dims(tmp_path) is None
        with pytest.raises(CheckpointError, match=rf"{key}=.* is not supported for model_type=llama"):
            dims_of(read_config(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(text | {"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(CheckpointError, match="auto_map names code of the folder's own, which is never run"):
        dims_of(read_config(tmp_path))


def test_a_llama_whose_heads_do_not_divide_its_width_is_read(tmp_path: Path) -> None:
    """As kanana-1.5-2.1b, 1792 wide with 24 heads of 128; transformers has it only as a Mistral."""
    sizes = {"hidden_size": 42, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}
    model = save_tiny("mistral_tied_no_window", tmp_path, **sizes)
    values = json.loads((tmp_path / "config.json").read_text())
    for key in ("architectures", "model_type", "sliding_window"):
        del values[key]
    llama = values | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    dims, source = open_hf(tmp_path)
    assert dims == quick_folder_dims(tmp_path) and (dims.family, dims.head_dim, dims.window) == ("mistral", 16, None)
    export_hf(tmp_path, tmp_path / "out", dims, source, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **EAGER).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    (tmp_path / "config.json").write_text(json.dumps(llama | {"attention_bias": True}))
    with pytest.raises(CheckpointError, match="config.json cannot be read|lacks 16 tensors"):
        open_hf(tmp_path)


def test_code_that_became_a_class_of_transformers_is_not_missed(tmp_path: Path) -> None:
    """Folders of Phi-3 name the code that they came with; transformers has it as its own."""
    save_tiny("phi3", tmp_path)
    plain, text = quick_folder_dims(tmp_path), json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(text | {"auto_map": auto_map}))
    dims, source = open_hf(tmp_path)
    assert dims == quick_folder_dims(tmp_path) == plain is not None
    export_hf(tmp_path, tmp_path / "out", dims, source, torch.float32)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    auto_map["AutoModelForCausalLM"] = "modeling_own.Phi3ForCausalLM"
    (tmp_path / "config.json").write_text(json.dumps(text | {"auto_map": auto_map}))
    with pytest.raises(CheckpointError, match="auto_map names code of the folder's own, which is never run"):
        open_hf(tmp_path)


@pytest.mark.parametrize(
    ("hidden", "heads", "is_refused"), [(48, 4, False), (36, 3, False), (36, 2, True), (24, 4, True)]
)
def test_a_phi3_with_longrope_is_as_wide_as_its_heads(hidden: int, heads: int, is_refused: bool) -> None:
    """transformers counts the factors by hidden size / heads, and refuses the config where these are others."""
    config = tiny_config("phi3_tied_longrope")
    sizes = {"hidden": hidden, "heads": heads, "groups": 1}
    problem = export_problem(dims_of(config).with_shape(**sizes))
    assert (problem is not None) == is_refused
    if problem is not None:
        assert problem.startswith(f"search.hidden={hidden} / search.heads={heads} must be 12, the width of a head")
        with pytest.raises(CheckpointError, match="the width of a head"):
            resized(config, dims_of(config).with_shape(**sizes))
        with pytest.raises(Exception, match="short_factor field must have length"):
            tiny_config("phi3_tied_longrope", hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=1)
    else:
        assert dims_of(resized(config, dims_of(config).with_shape(**sizes))).shape()["hidden"] == hidden
    assert export_problem(dims_of(tiny_config("phi3")).with_shape(**sizes)) is None
