"""Refits over windows of which few places count, against the counted rows of transformers' models in float64."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compactlm_nemo.data.marks import mark
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.pruning.block_replacement import measure_replacements
from compactlm_nemo.pruning.reconstruct_sequential import SequentialReconstruction
from tests.pruning import test_reconstruct_sequential as walks
from tests.pruning.test_cut import HIDDEN, student_of
from tests.pruning.test_reconstruct import activations, calibration
from tests.support.meshes import LAYOUTS, filled, mesh_of, whole_logits
from tests.support.ranks import run_ranks
from tests.support.tiny_models import EAGER, save_tiny, tokens

BLOCKS = [(1, 2), (3, 4)]


def counts() -> Tensor:
    """A third of the places; of the first sample none in the second half, of the last but one place."""
    counts_NS = torch.rand(5, 24, generator=torch.Generator().manual_seed(6)) < 0.5
    counts_NS[0, 12:] = False
    counts_NS[4] = torch.arange(24) == 7
    return counts_NS


def marked() -> Tensor:
    return mark(calibration(), counts())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rows, see_all = tmp_path_factory.mktemp("marked_walk"), counts().flatten().numpy(), walks.seen_in
    teacher = save_tiny("llama", root / "llama").double()
    seen = {name: x[rows] for name, x in activations(teacher).items()}
    torch.save(seen, root / "seen.pt")
    dims, source = open_hf(root / "llama")
    cut = walks.plain_source(dims, source, HIDDEN)[1]
    export_hf(root / "llama", root / "cut", student_of(dims, HIDDEN), cut, torch.float32)
    big, small = (
        AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float64, **EAGER).eval()
        for name in ("llama", "cut")
    )
    with pytest.MonkeyPatch.context() as patch:  # all that the walk of the other test sees are the counted rows
        patch.setattr(
            walks, "seen_in", lambda model, wanted: {name: x[rows] for name, x in see_all(model, wanted).items()}
        )
        walks.walked(big, small, HIDDEN)
    with torch.no_grad():
        torch.save(small(tokens(), use_cache=False).logits, root / "walked.pt")
    shutil.rmtree(root / "cut")
    return root


def _matches(rank: int, world: int, layout: dict[str, Any], root: Path) -> None:
    mesh = mesh_of(**layout)
    walk = replace(walks.reconstruction(SequentialReconstruction, root / "llama", mesh, HIDDEN), windows_NS=marked())
    walk.run(lambda done: None)
    logits = whole_logits(walk.student, walk.dims, mesh, tokens())
    if logits is not None:
        want = torch.load(root / "walked.pt")
        torch.testing.assert_close(logits.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    _, model = filled(root / "llama", mesh)
    seen = torch.load(root / "seen.pt", weights_only=False)
    found = measure_replacements(model.eval(), marked(), BLOCKS, micro_batch=2, progress=lambda samples: None)
    for start, end in BLOCKS:
        x, gap = seen[f"layers.{start - 1}.mlp"], seen[f"h.{end}"] - seen[f"r.{start - 1}"]
        weight = 1 / (seen[f"h.{end}"] ** 2).mean(axis=1, keepdims=True)
        replacement = found[start - 1]
        for got, want in ((replacement.gram_FF, (weight * x).T @ x), (replacement.target_FH, (weight * x).T @ gap)):
            numpy.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5 * numpy.abs(want).max())


@pytest.mark.parametrize("layout", ["1", "dp2", "pp2", "cp2", "tp2_sp"])
def test_refits_are_over_the_places_that_count_in_every_layout(layout, root, tmp_path):
    run_ranks(_matches, LAYOUTS[layout][0], tmp_path, LAYOUTS[layout][1], root)
