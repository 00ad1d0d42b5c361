"""Megatron-Bridge itself, with a stand-in for Transformer Engine, reads our checkpoints, and we read its."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compactlm_nemo.config.model import ModelConfig
from compactlm_nemo.models.bridge import engine_tensors, export_bridge
from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.models.read_back import read_back
from compactlm_nemo.models.source import open_teacher
from tests.support import commands
from tests.support.bridge import (
    CASES,
    GOLDEN,
    ROOT,
    bridge_python,
    make_source,
    pruned,
    run_bridge,
    tensors_of,
    written,
)

PRUNED = ("llama", "qwen2_tied", "nemotron", "qwen3_moe")
ALL = [*CASES, *(f"{case}_pruned" for case in PRUNED)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case: `hf`, what Bridge makes of it, what we make of it, and what Bridge makes of that, in one go."""
    root = tmp_path_factory.mktemp("bridge")
    jobs = []
    for case in ALL:
        name, folder = case.removesuffix("_pruned"), root / case
        if case in CASES:
            dims, source = make_source(name, folder / "hf")
            jobs.append(["import", f"{folder}/hf", f"{folder}/theirs"])
        else:
            dims, source = pruned(open_hf(root / name / "hf")[0])
            export_hf(root / name / "hf", folder / "hf", dims, source, torch.float32)
        export_bridge(root / name / "hf", folder / "ours", dims, source, torch.float32, 2**32)
        jobs.append(["export", f"{folder}/ours", f"{folder}/ours/hf", f"{folder}/back"])
        jobs.append(["start", f"{folder}/ours", f"{folder}/start.pt"])
    run_bridge(jobs, root)
    return root


@pytest.mark.proves("formats", "Bridge out", "{case}", "equal")
@pytest.mark.parametrize("case", ALL)
def test_bridge_exports_our_checkpoint_as_the_model_that_it_is(case: str, made: Path) -> None:
    want = load_file(made / case / "hf" / "model.safetensors")
    got = load_file(made / case / "back" / "model.safetensors")
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(tensor, got[name]), name
    ours, theirs = (json.loads((made / case / name / "config.json").read_text()) for name in ("hf", "back"))
    assert open_hf(made / case / "back")[0] == open_hf(made / case / "hf")[0], (ours, theirs)


@pytest.mark.parametrize("case", ALL)
def test_bridges_trainer_starts_from_our_checkpoint(case: str, made: Path) -> None:
    """Its parameters are those of the layers, one by one, which are compared with their slices of what is stored."""
    stored = tensors_of(made / case / "ours" / "iter_0000000")
    got = torch.load(made / case / "start.pt")
    count = 0
    for name, tensor in got.items():
        want = _slice(stored, name)
        assert torch.equal(tensor, want), name
        count += want.numel()
    assert count == sum(tensor.numel() for tensor in stored.values())


def _slice(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A parameter of a model that was built, out of the stored tensors of all layers and experts."""
    words = name.split(".")
    if words[:2] != ["decoder", "layers"]:
        return stored[name]
    layer, rest = int(words[2]), words[3:]
    if rest[:2] == ["mlp", "experts"]:
        expert = int(rest[-1].removeprefix("weight"))
        return stored[f"decoder.layers.mlp.experts.experts.{rest[2]}.weight"][layer, expert]
    return stored[".".join(["decoder.layers", *rest])][layer]


@pytest.mark.proves("formats", "Bridge in", "{case}", "equal")
@pytest.mark.parametrize("case", CASES)
def test_bridges_checkpoint_is_read_without_companions(case: str, made: Path) -> None:
    source = str(made / case / "theirs")
    dims, weights = open_teacher(ModelConfig(source=source))
    want_dims, want = open_hf(made / case / "hf")
    window = {"window": 8} if case == "mistral_window" else {}  # it writes 7, which is one more by its own meaning
    assert vars(dims) == vars(want_dims) | window
    for name in parameter_shapes(want_dims):
        assert torch.equal(weights(name), want(name)), name
    told = open_teacher(ModelConfig(source=source, hf_assets=str(made / case / "hf")))[0]
    assert told == want_dims


@pytest.mark.parametrize("case", CASES)
def test_the_golden_list_is_what_bridge_writes(case: str, made: Path) -> None:
    golden = json.loads(GOLDEN.read_text())[case]
    assert written(made / case / "theirs" / "iter_0000000", sorted(golden["model"])) == golden


@pytest.mark.parametrize("case", ["nemotron", "qwen3_moe"])
def test_bridge_proves_that_it_reads_what_was_exported(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `export.verify` asks it to."""
    stand_ins = os.pathsep.join(str(ROOT / "tests" / tool / "stand_in") for tool in ("bridge", "nemo"))
    monkeypatch.setenv("PYTHONPATH", stand_ins)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    dims, source = make_source(case, tmp_path / "hf")
    export_bridge(tmp_path / "hf", tmp_path / "ours", dims, source, torch.float32, 2**32)
    ours, names = dict(engine_tensors(dims, source, torch.float32)), (EMBEDDING, OUTPUT_LAYER)
    tool = read_back(str(bridge_python()), "bridge", tmp_path / "ours", ours.items(), names)
    assert tool.startswith("megatron-bridge 0.3.")


def test_what_the_page_says_works(tmp_path: Path) -> None:
    """The commands and the code of docs/bridge.md, one after another, on a tiny model of Bridge's own."""
    text = (ROOT / "docs" / "bridge.md").read_text()
    make_source("llama", tmp_path / "hf")
    run_bridge([["import", f"{tmp_path}/hf", f"{tmp_path}/checkpoint"]], tmp_path)
    places = {"/checkpoints/llama31_8b": f"{tmp_path}/checkpoint", "runs/width": f"{tmp_path}/run"}
    for place, here in places.items():
        text = text.replace(place, here)
    recipes = re.findall(r"^python (-m recipes\..*)$", text, re.M)
    assert len(recipes) == 2
    for words in recipes:
        done = commands.run([*words.split(), *(["export.of=teacher"] if "export" in words else [])])
        assert done.returncode == 0, done.stderr
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    (tmp_path / "page.py").write_text("\n".join(blocks) + "\nassert provider.num_layers == 4\n")
    run_bridge([["page", f"{tmp_path}/page.py"]], tmp_path)
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "run/from_bridge"))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
