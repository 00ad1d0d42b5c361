"""A step of the optimizer in two halves, the norm and the update, is Megatron's own step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.optimizer import TrainableModel
from tests.support.meshes import LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

CFG = DistillConfig(steps=3, global_batch=4, lr=1e-2)
SCALE = 0.25
"""Of the gradients, whose norm is far above 0.1 and far below 1e6."""


def _model(root: Path, mesh: Mesh, clip_grad: float) -> TrainableModel:
    """Return a model with gradients that are drawn from the names of its parameters' shards."""
    model = TrainableModel(filled(root / "model", mesh)[1], replace(CFG, clip_grad=clip_grad))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.ddps.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * SCALE)  # type: ignore[attr-defined]
    model.advance_schedule()
    return model


def _weights(model: TrainableModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.ddps.parameters()]


def _two_halves(rank: int, world: int, root: Path, layout: str) -> None:
    mesh, clipped = mesh_of(**LAYOUTS[layout][1]), {}
    for clip_grad in (0.0, 0.1, 1e6):
        whole, halves = (_model(root, mesh, clip_grad) for _ in range(2))
        before = _weights(halves)
        _, norm, _ = whole.optimizer.step()
        assert halves.gradient_norm() == norm and math.isfinite(norm) and 0.1 < norm < 1e6
        halves.update(norm)
        clipped[clip_grad] = [whole.optimizer.param_groups[0]["params"][0].grad.clone()]
        assert all(a.equal(b) for a, b in zip(_weights(whole), _weights(halves), strict=True))
        assert not any(a.equal(b) for a, b in zip(_weights(halves), before, strict=True))
        grads = [[p.grad for g in m.optimizer.param_groups for p in g["params"]] for m in (whole, halves)]
        assert all(a.equal(b) for a, b in zip(*grads, strict=True))
    assert not clipped[0.0][0].equal(clipped[0.1][0]), "nothing was clipped"
    assert clipped[0.0][0].equal(clipped[1e6][0]), "what is small was clipped"


@pytest.mark.parametrize("layout", ["1", "tp2", "dp2"])
def test_the_norm_and_the_update_are_one_step_of_megatron(layout: str, root: Path, tmp_path: Path) -> None:
    run_ranks(_two_halves, LAYOUTS[layout][0], tmp_path, root, layout)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("optimizer")
    save_tiny("llama", root / "model")
    return root
