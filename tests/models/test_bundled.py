"""The bundled teacher, a real model: Megatron's logits are transformers', and it comes back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compactlm_nemo.config.load import CONF
from compactlm_nemo.data.bundled import fetch_bundled
from compactlm_nemo.models import gguf
from compactlm_nemo.models.checkpoint import CheckpointSource, save_model
from compactlm_nemo.models.hf import export_hf, open_hf
from tests.support.meshes import filled, mesh_of, whole_logits
from tests.support.ranks import run_ranks

TEXT = "The capital of France is Paris. Water is made of hydrogen and oxygen, and the sun is a star."


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assets = CONF.parent / "runs" / "assets"
    fetch_bundled(assets)
    folder = tmp_path_factory.mktemp("teacher")
    gguf.convert(assets / "teacher.gguf", folder)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    torch.save((ids, logits), folder / "want.pt")
    return folder


def _compare(rank: int, world: int, tp: int, pp: int, folder: Path, out: Path) -> None:
    mesh = mesh_of(tp, pp)
    ids, want = torch.load(folder / "want.pt")
    dims, model = filled(folder, mesh, vocab_multiple=128)
    got = whole_logits(model.eval(), dims, mesh, ids)
    if got is not None:
        # Logits reach 35: 1e-4 is about 25 units in the last place of float32.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    save_model(out, model)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (1, 2)])
def test_the_bundled_teacher_is_the_same_model(tp: int, pp: int, teacher: Path, tmp_path: Path) -> None:
    run_ranks(_compare, tp * pp, tmp_path, tp, pp, teacher, tmp_path / "ck")
    dims, _ = open_hf(teacher)
    export_hf(teacher, tmp_path / "hf", dims, CheckpointSource(tmp_path / "ck", dims), torch.float32)
    want, got = load_file(teacher / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_bundled_teacher_knows_its_language(teacher: Path) -> None:
    """A dequantisation or rotary mistake that both sides shared would show here: the text would be noise."""
    ids, logits = torch.load(teacher / "want.pt")
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert 1.0 < loss < 3.5
