"""The loss of every layout against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.data.marks import mark
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from tests.support.meshes import COMBINED, EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

CASES = ("llama", "qwen2_tied")
EXPERTS = ("qwen2_moe",)


def windows() -> Tensor:
    """Five windows: neither two data-parallel ranks nor micro-batches of two come out even."""
    return torch.randint(0, VOCAB, (5, 13), generator=torch.Generator().manual_seed(4))


def counts() -> Tensor:
    """Which of the 12 places of each window count: none of the third, and of the last all."""
    counts_NS = torch.rand(5, 12, generator=torch.Generator().manual_seed(2)) < 0.3
    counts_NS[2], counts_NS[4] = False, True
    return counts_NS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loss")
    for case in CASES + EXPERTS:
        model = save_tiny(case, root / case).double()
        with torch.no_grad():
            answers = windows()
            answers[:, 1:][~counts()] = -100
            losses = [float(model(windows(), labels=labels).loss) for labels in (windows(), answers)]
            torch.save(losses, root / case / "losses.pt")
    return root


def _matches(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        dims, model = filled(root / case, mesh)
        marked = mark(windows(), F.pad(counts(), (0, 1), value=True))
        num_tokens = (5 * 12, int(counts().sum()))
        for windows_NT, loss, num in zip(
            (windows(), marked), torch.load(root / case / "losses.pt"), num_tokens, strict=True
        ):
            got = evaluate_lm_loss(model, windows_NT, micro_batch=2, progress=lambda samples: None)
            assert got.loss_nats == pytest.approx(loss, rel=1e-5)
            assert got.tokens == num
            assert got.tokens_per_second > 0


@pytest.mark.parametrize("layout", COMBINED)
def test_loss_is_that_of_transformers_in_every_layout(layout, root, tmp_path):
    run_ranks(_matches, LAYOUTS[layout][0], tmp_path, LAYOUTS[layout][1], CASES, root)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_loss_with_experts_is_that_of_transformers(layout, root, tmp_path):
    run_ranks(_matches, EXPERT_LAYOUTS[layout][0], tmp_path, EXPERT_LAYOUTS[layout][1], EXPERTS, root)
