"""Megatron-Core on a CPU compiles nothing by itself, and what is compiled on purpose still is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._dynamo.utils import counters

from tests.support.meshes import filled, mesh_of, whole_logits
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny, tokens

COMPILED_BY_MEGATRON = ["nemotron", "mixtral", "qwen2_moe"]
"""Families whose layers call functions that Megatron-Core wraps in `torch.compile`."""


def _train(rank: int, world: int, folder: Path) -> None:
    mesh = mesh_of()
    counters.clear()
    for case in COMPILED_BY_MEGATRON:
        save_tiny(case, folder / case)
        dims, model = filled(folder / case, mesh)
        logits = whole_logits(model, dims, mesh, tokens())
        assert logits is not None
        assert not counters["frames"], f"{case}: {dict(counters['frames'])}"
    torch.compile(torch.square, backend="eager")(torch.ones(2))
    assert counters["frames"]["ok"] == 1


def test_no_layer_of_megatron_starts_a_compiler(tmp_path: Path) -> None:
    run_ranks(_train, 1, tmp_path, tmp_path)
