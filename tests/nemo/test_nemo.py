"""NeMo 2 itself, of an environment of its own, with a stand-in for Transformer Engine: it reads ours, we its."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compactlm_nemo.config.model import ModelConfig
from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.models.nemo import export_nemo, nemo_settings, nemo_tensors, untied_for_nemo
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.models.read_back import read_back
from compactlm_nemo.models.source import open_teacher
from tests.support.bridge import pruned
from tests.support.nemo import (
    CASES,
    FORGOTTEN,
    GOLDEN,
    make_source,
    nemo_environment,
    nemo_python,
    run_nemo,
    settings_classes,
    written,
)

PRUNED = ("llama", "qwen2_tied", "qwen3", "nemotron", "mixtral", "qwen3_moe")
ALL = [*CASES, *(f"{case}_pruned" for case in PRUNED)]
BF16 = "llama"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case: `hf`, what NeMo makes of it, what we make of it, and what NeMo makes of that, in one go."""
    root = tmp_path_factory.mktemp("nemo")
    jobs = []
    for case in ALL:
        name, folder = case.removesuffix("_pruned"), root / case
        if case in CASES:
            dims, source = make_source(name, folder / "hf")
            jobs.append(["import", CASES[case].model, CASES[case].settings, f"{folder}/hf", f"{folder}/theirs"])
        else:
            dims, source = pruned(open_hf(root / name / "hf")[0])
            dims = replace(dims, experts_per_token=min(2, dims.experts_per_token))
            export_hf(root / name / "hf", folder / "hf", dims, source, torch.float32)
        export_nemo(root / name / "hf", folder / "ours", dims, source, torch.float32, 0)
        jobs.append(["export", f"{folder}/ours", f"{folder}/back"])
        jobs.append(["load", f"{folder}/ours", f"{folder}/context.json"])
    dims, source = open_hf(root / BF16 / "hf")
    export_nemo(root / BF16 / "hf", root / "bf16" / "ours", dims, source, torch.bfloat16, 0)
    jobs.append(["export", f"{root}/bf16/ours", f"{root}/bf16/back"])
    jobs.append(["defaults", ",".join(settings_classes()), f"{root}/defaults.json"])
    run_nemo(jobs, root)
    return root


@pytest.mark.proves("formats", "NeMo 2 out", "{case}", "equal")
@pytest.mark.parametrize("case", ALL)
def test_nemo_exports_our_checkpoint_as_the_model_that_it_is(case: str, made: Path) -> None:
    """Of a tied Qwen3 its files hold an output layer that was never set, and its config says that nobody reads it."""
    want = load_file(made / case / "hf" / "model.safetensors")
    got = load_file(made / case / "back" / "model.safetensors")
    held = untied_for_nemo(open_hf(made / case / "hf")[0])
    assert json.loads((made / case / "back" / "config.json").read_text())["tie_word_embeddings"] is held.tied_embeddings
    if held.tied_embeddings:
        got.pop("lm_head.weight", None)
    else:
        want.setdefault("lm_head.weight", want["model.embed_tokens.weight"])
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(tensor, got[name]), name


def test_nemo_exports_bf16_as_bf16(made: Path) -> None:
    want = load_file(made / BF16 / "hf" / "model.safetensors")
    got = load_file(made / "bf16" / "back" / "model.safetensors")
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert got[name].dtype is torch.bfloat16 and torch.equal(tensor.bfloat16(), got[name]), name


@pytest.mark.parametrize("case", ALL)
def test_nemo_loads_the_context_that_we_write(case: str, made: Path) -> None:
    dims = untied_for_nemo(open_hf(made / case / "hf")[0])
    told = json.loads((made / case / "context.json").read_text())
    settings = nemo_settings(dims, torch.float32)
    assert settings.pop("params_dtype") == "torch.float32"
    assert {name: told["values"][name] for name in settings} == settings
    assert len(told["ids"]) == 3 and told["ids"][0] == told["ids"][2] != told["ids"][1]


@pytest.mark.parametrize("case", ["nemotron", "qwen2_tied", "qwen3_moe_pruned"])
def test_nemo_proves_that_it_reads_what_was_exported(case: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `export.verify` asks it to."""
    monkeypatch.setenv("PYTHONPATH", nemo_environment()["PYTHONPATH"])
    dims, source = open_hf(made / case / "hf")
    tensors = nemo_tensors(dims, source, torch.float32)
    names = (EMBEDDING, OUTPUT_LAYER)
    assert read_back(str(nemo_python()), "nemo2", made / case / "ours", tensors, names).startswith("nemo-toolkit 2.")


@pytest.mark.proves("formats", "NeMo 2 in", "{case}", "equal")
@pytest.mark.parametrize("case", CASES)
def test_nemos_checkpoint_is_read_without_companions(case: str, made: Path) -> None:
    """Where NeMo's import forgets what the Hugging Face config said, its own checkpoint counts."""
    source = str(made / case / "theirs")
    dims, weights = open_teacher(ModelConfig(source=source))
    want_dims, want = open_hf(made / case / "hf")
    assert vars(dims) == vars(want_dims) | FORGOTTEN.get(case, {})
    for name in parameter_shapes(want_dims):
        assert torch.equal(weights(name), want(name)), name


@pytest.mark.parametrize("case", CASES)
def test_the_golden_list_is_what_nemo_writes(case: str, made: Path) -> None:
    golden = json.loads(GOLDEN.read_text())["checkpoints"][case]
    assert written(made / case / "theirs", set(golden["described"]["values"])) == golden


def test_the_golden_defaults_are_nemos(made: Path) -> None:
    golden, told = json.loads(GOLDEN.read_text())["defaults"], json.loads((made / "defaults.json").read_text())
    assert golden == {kind: {name: told[kind].get(name) for name in values} for kind, values in golden.items()}
