"""What an import holds in memory: this rank's weights and a part of the teacher's files, however many there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bench.common.memory import ENVIRONMENT, peak_bytes
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import tiny_model

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}


def _import(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of(tp=world)
    filled(root / "tiny", mesh)  # brings what is imported and built once
    made: list[torch.nn.Module] = []
    growth = peak_bytes(lambda: made.extend(filled(root / "model", mesh)[1]))
    own = sum(4 * parameter.numel() for chunk in made for parameter in chunk.parameters())
    sizes = [path.stat().st_size for path in (root / "model").glob("*.safetensors")]
    assert sum(sizes) > 3 * 1.3 * max(sizes), "all files at once would be noticed"
    assert own < growth < own + 1.3 * max(sizes), (growth, own, max(sizes))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' peak of the resident set")
@pytest.mark.parametrize("world", [1, 2])
def test_an_import_holds_its_ranks_weights_and_a_third_more_than_one_file(
    world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "model", max_shard_size="26MB")
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    run_ranks(_import, world, tmp_path, tmp_path, start_method="spawn")
