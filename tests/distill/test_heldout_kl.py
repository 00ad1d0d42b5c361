"""Held-out LM loss and KL against transformers' models in float64, on several layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.data.marks import mark
from compactlm_nemo.distill.heldout_kl import GROUP, evaluate_kd_loss
from compactlm_nemo.distill.teacher import LiveTeacher
from tests.support.meshes import LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

NUM = 2 * GROUP + 1  # more than a group of micro-batches, and no multiple of 2


def windows() -> Tensor:
    return torch.randint(0, VOCAB, (NUM, 13), generator=torch.Generator().manual_seed(5))


def counts() -> Tensor:
    """Which of the 12 places of each window count: none of the first window, and none of place 5."""
    counts_NS = torch.rand(NUM, 12, generator=torch.Generator().manual_seed(6)) < 0.4
    counts_NS[0], counts_NS[:, 5] = False, False
    return counts_NS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kd_loss")
    teacher = save_tiny("llama", root / "teacher").double()
    student = save_tiny("llama", root / "student", hidden_size=32, intermediate_size=48).double()
    tokens = windows()
    with torch.no_grad():
        s, t = (model(tokens[:, :-1]).logits.flatten(0, 1) for model in (student, teacher))
    log_q, log_p = F.log_softmax(s, -1), F.log_softmax(t, -1)
    kl_NS = (log_p.exp() * (log_p - log_q)).sum(-1).view(NUM, -1)
    # 8 ranges of 12 positions, in turn two long and one: place p is in range p * 8 // 12.
    spans = {0: (0, 2), 2: (2, 3), 3: (3, 5), 5: (5, 6), 6: (6, 8), 8: (8, 9), 9: (9, 11), 11: (11, 12)}
    for name, rows in (("all", torch.ones_like(counts())), ("marked", counts())):
        of_span = {first: kl_NS[:, start:end][rows[:, start:end]] for first, (start, end) in spans.items()}
        kl_from = {first: values.mean().item() for first, values in of_span.items() if len(values)}
        assert len(kl_from) == (8 if name == "all" else 7)
        loss = F.cross_entropy(s[rows.flatten()], tokens[:, 1:][rows]).item()
        torch.save((loss, kl_NS[rows].mean().item(), kl_from), root / f"{name}.pt")
    return root


def _matches(rank: int, world: int, layout: dict[str, Any], root: Path) -> None:
    mesh = mesh_of(**layout)
    _, student = filled(root / "student", mesh)
    dims, teacher = filled(root / "teacher", mesh)
    for name, windows_NT in (("all", windows()), ("marked", mark(windows(), F.pad(counts(), (0, 1), value=True)))):
        got = evaluate_kd_loss(student, LiveTeacher(teacher), windows_NT, micro_batch=1)
        *losses, kl_from = torch.load(root / f"{name}.pt")
        assert got[:2] == pytest.approx(tuple(losses), rel=1e-5)
        assert got.kl_from == pytest.approx(kl_from, rel=1e-5)


@pytest.mark.parametrize("layout", ["1", "dp2", "tp2_pp2", "vpp2", "cp2"])
def test_held_out_losses_are_the_definition(layout: str, root: Path, tmp_path: Path) -> None:
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, root)
