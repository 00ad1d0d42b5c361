"""Random numbers go on after a stop as if there had been none, on ranks that are placed alike."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.training.checkpoint import Checkpoints, TrainState
from compactlm_nemo.training.optimizer import TrainableModel
from tests.support.meshes import LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

CFG = DistillConfig(steps=3, global_batch=4)


def _draws() -> list[float]:
    """Numbers of every generator of this rank."""
    tracker = get_cuda_rng_tracker()
    drawn = [float(torch.rand(()))]
    for name in sorted(tracker.get_states()):
        with tracker.fork(name):
            drawn.append(float(torch.rand(())))
    return drawn


def _resumes(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of(**LAYOUTS["tp2"][1])
    torch.manual_seed(100 + rank)  # every rank draws its own
    model = TrainableModel(filled(root / "model", mesh)[1], CFG)
    checkpoints = Checkpoints(root / "checkpoints", keep=2, is_main=rank == 0)
    _draws()
    checkpoints.save(model, TrainState(step=1))
    want = _draws()
    assert len(want) == 4 and _draws() != want
    assert checkpoints.load(model, step=1).step == 1
    assert _draws() == want
    others: list[list[float]] = [[], []]
    torch.distributed.all_gather_object(others, want)
    assert others[0][0] != others[1][0], "both ranks drew the numbers of one"


def test_every_generator_of_every_rank_goes_on(root: Path, tmp_path: Path) -> None:
    run_ranks(_resumes, 2, tmp_path, root)


def _elsewhere(rank: int, world: int, root: Path, log: str) -> None:
    logging.basicConfig(filename=log)
    mesh = mesh_of()
    model = TrainableModel(filled(root / "model", mesh)[1], CFG)
    checkpoints = Checkpoints(root / "other", keep=2, is_main=rank == 0)
    if world == 2:
        checkpoints.save(model, TrainState(step=1))
        return
    before = torch.get_rng_state()
    checkpoints.load(model, step=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_on_ranks_that_are_placed_otherwise_they_begin_with_the_seed_and_a_warning(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_ranks(_elsewhere, 2, tmp_path, root, str(log))
    assert "another layout" not in log.read_text()
    run_ranks(_elsewhere, 1, tmp_path, root, str(log))
    assert log.read_text().count("saved in another layout; random states begin with run.seed.") == 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    save_tiny("llama", root / "model", num_hidden_layers=2)
    return root
