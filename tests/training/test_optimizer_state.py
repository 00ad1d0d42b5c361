"""A rank stores the optimizer state that it holds, as boxes of whole parameters, and nothing is gathered."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.models.checkpoint import model_state
from compactlm_nemo.training.checkpoint import Checkpoints, TrainState
from compactlm_nemo.training.optimizer import TrainableModel
from compactlm_nemo.training.optimizer_state import allocate, flat_boxes, sharded_state
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

MIB = 2**20
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
"""A model of 13.5 M parameters: what is gathered stands out from what a process holds anyway."""


@pytest.mark.parametrize("shape", [(7,), (1, 6), (4, 5), (1, 3, 4), (2, 3, 4), (2, 2, 2, 3)], ids=str)
def test_boxes_hold_the_range_of_the_flattened_tensor_in_its_order(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    values = torch.arange(size).view(shape)
    for start, end in itertools.combinations_with_replacement(range(size + 1), 2):
        boxes = flat_boxes(shape, start, end)
        assert len(boxes) <= 2 * len(shape) - 1
        found: list[int] = []
        for box in boxes:
            part = values[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
            assert tuple(part.shape) == box.shape and part.numel() == box.numel > 0
            found += part.flatten().tolist()
        assert found == list(range(start, end))


def _model(root: Path) -> TrainableModel:
    _, chunks = filled(root / "model", mesh_of())
    return TrainableModel(chunks, DistillConfig(steps=3, global_batch=4))


def _peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident set was larger at its peak while `work` ran."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at the present size
    before = psutil.Process().memory_info().rss
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peak - before


def _memory(rank: int, world: int, root: Path) -> None:
    model = _model(root)
    allocate(model.optimizer)
    count = sum(parameter.numel() for parameter in model.ddps.parameters())
    boxes = sharded_state(model.optimizer, model_state(model.ddps))
    # Main weight and two moments of float32, each in one place.
    assert abs(sum(box.data.nbytes for box in boxes) - 12 * count / world) < 12 * 1024
    owners = {
        tensor.untyped_storage().data_ptr()
        for part in model.optimizer.chained_optimizers
        for main, state in part.optimizer.state.items()
        for tensor in (main, state["exp_avg"], state["exp_avg_sq"])
    }
    assert {box.data.untyped_storage().data_ptr() for box in boxes} <= owners
    checkpoints = Checkpoints(root / "checkpoints", keep=1, is_main=rank == 0)
    checkpoints.save(model, TrainState())  # starts the writers
    assert 12 * count // world > 30 * MIB, "a copy of this rank's share would be noticed"
    growth = {
        "save": _peak_growth(lambda: checkpoints.save(model, TrainState(step=1))),
        "load": _peak_growth(lambda: checkpoints.load(model, step=1)),
        "gathered": _peak_growth(lambda: _gather(model)),
    }
    assert growth["save"] < 24 * MIB, growth
    assert growth["load"] < 24 * MIB, growth
    assert growth["gathered"] > 12 * count, growth  # the measure would have seen it


def _gather(model: TrainableModel) -> None:
    """Megatron's own state that loads in any layout."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": model.ddps.mesh.dp_cp_group}
    model.optimizer.sharded_state_dict(model_state(model.ddps)["model0"], is_loading=False, metadata=metadata)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' peak of the resident set")
def test_saving_and_loading_copy_not_even_one_ranks_share(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", **WIDE)
    run_ranks(_memory, 4, tmp_path, tmp_path)


def _experts(rank: int, world: int, root: Path) -> None:
    """Two ranks of experts store twice the weight as its mean gradient; one rank finds it so."""
    mesh = mesh_of(ep=world)
    model = TrainableModel(filled(root / "model", mesh)[1], DistillConfig(steps=3, global_batch=4))
    allocate(model.optimizer)
    checkpoints = Checkpoints(root / "checkpoints", keep=1, is_main=rank == 0)
    states = [
        (main, state) for part in model.optimizer.chained_optimizers for main, state in part.optimizer.state.items()
    ]
    if world == 2:
        for main, state in states:
            state["exp_avg"].copy_(2 * main)
        checkpoints.save(model, TrainState(step=1))
        return
    checkpoints.load(model, step=1)
    assert all(torch.equal(state["exp_avg"], 2 * main) and main.any() for main, state in states)


def test_moments_of_experts_on_two_ranks_load_on_one(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    run_ranks(_experts, 2, tmp_path, tmp_path)
    run_ranks(_experts, 1, tmp_path, tmp_path)
