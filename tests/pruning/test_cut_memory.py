"""What a cut holds beside teacher and student: half a parameter more than the largest, which is what is read."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.common.memory import ENVIRONMENT, peak_bytes
from compactlm_nemo.models.build import build_model, fill
from compactlm_nemo.models.checkpoint import CheckpointSource, save_model
from compactlm_nemo.pruning.cut import CutSource, NarrowedSource
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.pruning.residual_stream import (
    HiddenCut,
    NormedStream,
    RefittedSelection,
    RotatedStream,
    Selection,
    stream_rotation,
)
from tests.support.meshes import mesh_of
from tests.support.ranks import run_ranks
from tests.support.shapes import TINY

WIDTH, KEPT, FFN = 256, 224, 512
TEACHER = replace(
    TINY, hidden_size=WIDTH, ffn_hidden_size=FFN, num_heads=4, num_query_groups=2, head_dim=32, vocab_size=65536
)
PLAN = Plan(
    layers=[0, 1],
    heads={layer: torch.arange(4) for layer in (0, 1)},
    mlp={layer: torch.arange(FFN) for layer in (0, 1)},
    hidden=torch.arange(KEPT),
)


def _cuts(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    for is_tied in (True, False):
        dims = replace(TEACHER, tied_embeddings=is_tied)
        folder = root / f"teacher_{is_tied}"
        teacher = build_model(dims, mesh, dtype=torch.float32, vocab_multiple=8)
        for parameter in teacher.parameters():
            parameter.data.normal_()
        save_model(folder, teacher)
        source = CheckpointSource(folder, dims)
        stream = NormedStream(lambda name: torch.eye(WIDTH) + 0.1, 10, source)
        ways: dict[str, HiddenCut] = {
            "selected": Selection(PLAN.hidden),
            "refitted": RefittedSelection(PLAN.hidden, stream, 0.1, is_rms=True),
            "rotated": RotatedStream(stream_rotation(dims, PLAN.layers, KEPT, stream), stream, 0.1),
        }
        largest = 4 * dims.vocab_size * WIDTH
        for way, hidden in ways.items():
            student = build_model(replace(dims, hidden_size=KEPT), mesh, dtype=torch.float32, vocab_multiple=8)
            narrowed = NarrowedSource(CutSource(dims, PLAN, source), dims, PLAN.layers, hidden)
            run = partial(fill, student, narrowed, 8, narrowed.tables)
            run()  # brings what is imported and built once, and the student's memory
            growth = peak_bytes(run)
            assert largest < growth < 1.5 * largest, (way, is_tied, growth, largest)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' peak of the resident set")
def test_a_cut_holds_half_a_parameter_beside_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    run_ranks(_cuts, 1, tmp_path, tmp_path, start_method="spawn")
