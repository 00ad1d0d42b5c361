"""Which model leaves, in which number format: the teacher as imported, the student as cut, or the distilled one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf_assets import dtype_of
from tests.support import commands
from tests.support.stopped_runs import copy_artifacts
from tests.support.tiny_models import tiny_config
from tests.support.tiny_run import command, make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def pruned(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has a student and no distilled model."""
    run = tmp_path_factory.mktemp("runs") / "pruned"
    for recipe in ("import_model", "tokenize", "score", "search", "prune"):
        done = commands.run(command(inputs, run, recipe=recipe))
        assert done.returncode == 0, done.stderr
    return run


def _exported(inputs: Path, run: Path, *overrides: str) -> Path:
    done = commands.run(command(inputs, run, *overrides, recipe="export"))
    assert done.returncode == 0, done.stderr
    return run / "export" / "hf"


def test_the_pruned_student_leaves_before_it_is_trained(inputs: Path, pruned: Path, tmp_path: Path) -> None:
    run = copy_artifacts(pruned, tmp_path / "run")
    folder = _exported(inputs, run, "export.of=student")
    source = CheckpointSource(run / "student", Dims.load(run / "student" / "model.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embedding = source("embedding.word_embeddings.weight").to(_stored(folder)).float()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert model.config.intermediate_size == 32, "as it was cut"


def test_the_teacher_leaves_as_it_came(inputs: Path, pruned: Path, tmp_path: Path) -> None:
    folder = _exported(inputs, copy_artifacts(pruned, tmp_path / "run"), "export.of=teacher")
    want, got = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (inputs / "teacher", folder)
    )
    assert want.state_dict().keys() == got.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert torch.equal(tensor.to(_stored(folder)).float(), got.state_dict()[name]), name


def test_a_distilled_model_that_is_not_there_is_named(inputs: Path, pruned: Path, tmp_path: Path) -> None:
    run = copy_artifacts(pruned, tmp_path / "run")
    done = commands.run(command(inputs, run, recipe="export"))
    assert done.returncode == 2 and "distill" in done.stderr and not (run / "export").exists(), done.stderr


def test_the_number_format_is_the_teachers_unless_another_is_asked_for(
    inputs: Path, pruned: Path, tmp_path: Path
) -> None:
    run = copy_artifacts(pruned, tmp_path / "run")
    config = run / "teacher" / "hf" / "config.json"
    values = json.loads(config.read_text())
    assert _stored(_exported(inputs, run, "export.of=student")) is torch.float32 and values["dtype"] == "float32"
    shutil.rmtree(run / "export")  # made with other settings
    folder = _exported(inputs, run, "export.of=student", "export.dtype=bf16")
    assert _stored(folder) is torch.bfloat16 and dtype_of(folder) == "bfloat16"
    two = tmp_path / "bf16_teacher"
    AutoModelForCausalLM.from_pretrained(inputs / "teacher", dtype=torch.bfloat16).save_pretrained(two)
    for path in (inputs / "teacher").glob("tokenizer*"):
        (two / path.name).write_bytes(path.read_bytes())
    run = tmp_path / "from_bf16"
    done = commands.run(command(inputs, run, f"model.source={two}", recipe="import_model"))
    assert done.returncode == 0, done.stderr
    folder = _exported(inputs, run, f"model.source={two}", "export.of=teacher")
    assert _stored(folder) is torch.bfloat16, "half the size of the float32 in which it was worked with"


def test_weights_are_cut_into_files(inputs: Path, pruned: Path, tmp_path: Path) -> None:
    folder = _exported(inputs, copy_artifacts(pruned, tmp_path / "run"), "export.of=student", "export.shard_gib=1e-5")
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(files) > 1 and (folder / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(folder)


def _stored(folder: Path) -> torch.dtype:
    """The number format in the first file of weights."""
    with safe_open(sorted(folder.glob("*.safetensors"))[0], framework="pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype


@pytest.mark.proves("stages", "export", "Megatron-Bridge checkpoint", "written")
@pytest.mark.proves("stages", "import_model", "Megatron-Bridge checkpoint", "read")
def test_a_model_leaves_for_megatron_bridge_and_comes_back(inputs: Path, pruned: Path, tmp_path: Path) -> None:
    """The student as a checkpoint is a teacher without a config.json, whose Hugging Face folder is the student's."""
    run, again = copy_artifacts(pruned, tmp_path / "run"), tmp_path / "again"
    done = commands.run(command(inputs, run, "export.of=student", "export.format=bridge", recipe="export"))
    assert done.returncode == 0, done.stderr
    assert not (run / "export" / "hf").exists() and (run / "export" / "bridge" / "README.md").is_file()
    source = f"model.source={run}/export/bridge"
    for recipe, settings in (("import_model", []), ("export", ["export.of=teacher"])):
        done = commands.run(command(inputs, again, source, *settings, recipe=recipe))
        assert done.returncode == 0, done.stderr
    dims = Dims.load(run / "student" / "model.json")
    assert Dims.load(again / "teacher" / "model.json") == dims
    shutil.rmtree(run / "export")
    want, got = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (_exported(inputs, run, "export.of=student"), again / "export" / "hf")
    )
    assert want.state_dict().keys() == got.state_dict().keys()
    assert all(torch.equal(tensor, got.state_dict()[name]) for name, tensor in want.state_dict().items())
    assert got.config.architectures == ["LlamaForCausalLM"] and got.config.eos_token_id == 0
    assert (again / "export" / "hf" / "tokenizer.json").is_file()


def test_what_bridge_cannot_hold_is_told_before_anything_is_made(inputs: Path, tmp_path: Path) -> None:
    tiny_config("mixtral").save_pretrained(tmp_path / "mixtral")
    settings = [f"model.source={tmp_path}/mixtral", "dry_run=true", "export.format=bridge"]
    done = commands.run(command(inputs, tmp_path / "run", *settings, recipe="export"))
    assert done.returncode == 2, done.stderr
    assert "export.format=bridge: Megatron-Bridge has no mixtral, only llama, " in done.stderr, done.stderr
    assert "use export.format=hf" in done.stderr and not (tmp_path / "run").exists()
