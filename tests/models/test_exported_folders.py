"""Exported folders as others read them: transformers 4, and whoever looks for what its files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compactlm_nemo.errors import CheckpointError, NumericsError
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.models.hf_assets import assets_of, copy_hf_assets, dtype_of, older_reader_problem
from tests.support import transformers4
from tests.support.tiny_models import CASES, EAGER, save_tiny, tiny_config, tokens

YARN = {
    "rope_type": "yarn", "rope_theta": 3e5, "factor": 4.0, "original_max_position_embeddings": 128,
    "attention_factor": 1.1,
}  # fmt: skip


def exported(case: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A case saved by transformers 5, and exported from that."""
    save_tiny(case, folder / "source", **changes)
    dims, source = open_hf(folder / "source")
    export_hf(folder / "source", folder / "hf", dims, source, dtype)
    return folder / "hf"


@pytest.mark.slow
@pytest.mark.proves("formats", "transformers 4 reads it", CASES, "logits")
def test_transformers_4_has_equal_logits(tmp_path: Path) -> None:
    """It takes theta = 10000 and no scaling where a file of transformers 5 has them in `rope_parameters` alone."""
    # Its Qwen2-MoE has no head size but hidden_size / num_attention_heads.
    changes: dict[str, dict[str, Any]] = {"qwen2_moe": {"head_dim": 12}}
    # Its DeepSeek-V2 leaves mscale_all_dim out of attention.
    changes["deepseek_v2"] = {"rope_parameters": CASES["deepseek_v2"][1]["rope_parameters"] | {"mscale_all_dim": None}}
    folders = [exported(case, tmp_path / case, **changes.get(case, {})) for case in CASES]
    folders.append(exported("llama", tmp_path / "yarn", rope_parameters=YARN))
    torch.save(tokens(), tmp_path / "ids.pt")
    lines = transformers4.write_logits(tmp_path / "ids.pt", folders).splitlines()
    for folder, line in zip(folders, lines, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, **EAGER).eval()
        with torch.no_grad():
            want = model(tokens()).logits
        torch.testing.assert_close(torch.load(folder / "logits4.pt"), want, rtol=0, atol=1e-4, msg=str(folder))
        assert line == f"{folder} torch.float32"


@pytest.mark.parametrize(
    "case, changes, theta, scaling",
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ("llama", {"rope_parameters": YARN}, 3e5, "yarn"),
        ("llama_tied_llama3_rope", {}, 10000.0, "llama3"),
    ],
)
def test_theta_scaling_and_number_format_stand_at_the_top_level_too(
    case: str, changes: dict[str, Any], theta: float, scaling: str | None, tmp_path: Path
) -> None:
    folder = exported(case, tmp_path, torch.bfloat16, **changes)
    values = json.loads((folder / "config.json").read_text())
    assert (values["rope_theta"], values["torch_dtype"]) == (theta, "bfloat16")
    assert (values["rope_scaling"] or {}).get("rope_type") == scaling
    assert values["rope_parameters"]["rope_theta"] == theta, "as transformers 5 reads it"
    assert open_hf(folder)[0] == open_hf(tmp_path / "source")[0]
    assert dtype_of(folder) == "bfloat16"


def test_the_tokenizer_has_a_class_that_transformers_4_knows(tmp_path: Path) -> None:
    source = save_tiny_with_tokenizer(tmp_path / "source")
    text = (source / "tokenizer_config.json").read_text()
    assert json.loads(text)["tokenizer_class"] == "TokenizersBackend", "as transformers 5 writes it"
    dims, weights = open_hf(source)
    export_hf(source, tmp_path / "hf", dims, weights, torch.float32)
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and not {"is_local", "backend"} & written.keys()
    assert transformers4.tokenize(tmp_path / "hf", "w1 w2 w1") == "[3, 4, 3]"


def test_special_tokens_beside_the_usual_ones_stay_special_in_both(tmp_path: Path) -> None:
    """transformers 5 writes a list where version 4 wants a dict, and ends."""
    source = save_tiny_with_tokenizer(tmp_path / "source")
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": ["w2"]}))
    dims, weights = open_hf(source)
    export_hf(source, tmp_path / "hf", dims, weights, torch.float32)
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in written and written["additional_special_tokens"] == ["w2"]
    assert "w2" in AutoTokenizer.from_pretrained(tmp_path / "hf").all_special_tokens
    assert transformers4.tokenize(tmp_path / "hf", "w1 w2 w1") == "[3, 4, 3]"


def test_a_model_that_transformers_4_cannot_hold_is_named() -> None:
    problem = older_reader_problem(dims_of(tiny_config("qwen2_moe")))
    assert problem is not None and "4 heads of 16 in 48 channels needs transformers 5" in problem
    problem = older_reader_problem(dims_of(tiny_config("deepseek_v2")))
    assert problem is not None and "version 4 leaves it out of attention" in problem
    for case in set(CASES) - {"qwen2_moe", "deepseek_v2"}:
        assert older_reader_problem(dims_of(tiny_config(case))) is None


def save_tiny_with_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    save_tiny("llama", folder)
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "w1", "w2"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_small_files_travel_and_weights_and_code_do_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    travel = [
        "chat_template.json", "tekken.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "vocab.txt",
        "additional_chat_templates/rag.jinja",
    ]  # fmt: skip
    stay = [
        "modeling_own.py", "pytorch_model.bin", "model.safetensors.index.json.bak", "README.md", "trainer_state.json",
        "original/params.json", "additional_chat_templates/code.py", "picture.png", "adapter_config.json",
    ]  # fmt: skip
    for name in [*travel, *stay]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    assert set(assets_of(source)) == {"config.json", "generation_config.json", *travel}
    dims, weights = open_hf(source)
    export_hf(source, tmp_path / "hf", dims, weights, torch.float32)
    written = {str(path.relative_to(tmp_path / "hf")) for path in (tmp_path / "hf").rglob("*") if path.is_file()}
    assert written == {"config.json", "generation_config.json", "model.safetensors", *travel}


def test_a_link_among_them_that_leads_out_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    (tmp_path / "secret.txt").write_text("canary")
    (source / "NOTICE").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match=r"NOTICE is a link to .*secret.txt, outside of its folder"):
        copy_hf_assets(source, tmp_path / "hf")


def test_a_weight_that_a_number_format_cannot_hold_is_not_exported(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    dims, weights = open_hf(tmp_path / "source")
    with pytest.raises(NumericsError, match="embedding.word_embeddings.weight is not finite as torch.float16"):
        export_hf(tmp_path / "source", tmp_path / "hf", dims, lambda name: weights(name) * 1e6, torch.float16)
