"""What a save and a load hold in memory beside the model: a tensor or two, never the model again."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from bench.common.memory import ENVIRONMENT, peak_bytes
from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.models.checkpoint import load_model, own_storages, save_model
from compactlm_nemo.training.checkpoint import Checkpoints, TrainState
from compactlm_nemo.training.optimizer import TrainableModel
from compactlm_nemo.training.optimizer_state import allocate
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import tiny_model

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}


def _saves(rank: int, world: int, root: Path) -> None:
    mesh, dtype = mesh_of(), torch.bfloat16
    _, chunks = filled(root / "model", mesh, dtype=dtype)
    largest = max(parameter.numel() for parameter in chunks.parameters())
    weights = sum(parameter.numel() for parameter in chunks.parameters())
    model = TrainableModel(chunks, DistillConfig(steps=3, global_batch=4))
    allocate(model.optimizer)
    training = weights * (2 + 4 + 4 + 8)  # weight, gradient, main weight, two moments
    slack = 12 * largest  # numbers that are compared in float32, what is read of a file
    assert slack < 0.1 * training and 2 * slack < 2 * weights, "a second model would be noticed"

    def within(limit: float, run: partial[None]) -> None:
        growth = peak_bytes(run)
        assert growth < limit, f"{run.func.__name__}: {growth:,} bytes, at most {limit:,.0f}"

    checkpoints = Checkpoints(root / "checkpoints", keep=1, is_main=rank == 0)
    checkpoints.save(model, TrainState(step=1))  # imports what it needs
    within(0.1 * training, partial(checkpoints.save, model, TrainState(step=2)))
    save_model(root / "saved", chunks)
    within(slack, partial(save_model, root / "again", chunks))
    load_model(root / "saved", chunks)
    within(slack, partial(load_model, root / "saved", chunks))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' peak of the resident set")
def test_a_save_or_load_holds_no_second_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "model")
    run_ranks(_saves, 1, tmp_path, tmp_path, start_method="spawn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("may_change", [False, True])
def test_what_is_written_is_alone_in_its_storage(dtype: torch.dtype, may_change: bool) -> None:
    buffer = torch.arange(12).to(dtype)
    shard, row = (
        ShardedTensor.from_rank_offsets(key, buffer[start : start + 4].view(shape), (0, 0, 1))
        for key, start, shape in (("x", 4, (2, 2)), ("y", 8, (4,)))
    )
    own_storages({"a": {"b": [shard]}, "row": row, "plain": 3}, may_change=may_change)
    assert shard.data.tolist() == [[4, 5], [6, 7]] and row.data.tolist() == [8, 9, 10, 11]
    assert shard.data.untyped_storage().nbytes() == row.data.untyped_storage().nbytes() == 4 * dtype.itemsize
    assert (shard.data.data_ptr() == buffer[4:].data_ptr()) is not may_change
    where = shard.data
    del buffer
    assert where.tolist() == [[4, 5], [6, 7]], "the memory is gone with the buffer"
