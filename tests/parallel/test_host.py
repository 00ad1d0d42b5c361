"""Megatron-Core on a CPU compiles nothing by itself, what is compiled on purpose still is; gloo does as NCCL."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
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


SIZES = [3, 0, 2]
"""Rows of each rank."""


def _uneven_parts(rank: int, world: int) -> None:
    mesh_of()
    start = sum(SIZES[:rank])
    own = slice(start, start + SIZES[rank])
    values = [torch.randn(sum(SIZES), 4, generator=torch.Generator().manual_seed(seed)) for seed in range(world)]
    total = torch.stack(values).sum(dim=0)

    part = values[0][own].clone().requires_grad_()
    whole = gather_from_sequence_parallel_region(part, group=dist.group.WORLD, output_split_sizes=SIZES)
    assert torch.equal(whole, values[0])
    whole.backward(values[rank])
    assert part.grad is not None
    torch.testing.assert_close(part.grad, total[own])

    whole = values[rank].clone().requires_grad_()
    part = reduce_scatter_to_sequence_parallel_region(whole, group=dist.group.WORLD, input_split_sizes=SIZES)
    torch.testing.assert_close(part, total[own])
    assert torch.equal(whole, values[rank])
    part.backward(values[0][own])
    assert whole.grad is not None and torch.equal(whole.grad, values[0])


def test_parts_of_other_sizes_are_gathered_and_summed_with_their_gradients(tmp_path: Path) -> None:
    run_ranks(_uneven_parts, len(SIZES), tmp_path)
