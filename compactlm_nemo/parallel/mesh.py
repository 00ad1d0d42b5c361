"""Holds the device mesh as plain values; this module alone reads Megatron's `parallel_state`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from compactlm_nemo.config.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A mesh says where this process stands: its ranks, and the sizes and groups of each parallel axis.

    Data-parallel ranks have different samples, context-parallel ranks different parts of one sample; expert-parallel
    ranks are neighbours among the data-parallel ranks.
    """

    layout: ParallelConfig
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    cp_group: ProcessGroup
    dp_cp_group: ProcessGroup
    ep_group: ProcessGroup
    expert_dp_group: ProcessGroup
    """Ranks whose experts have equal numbers."""
    last_stage_rank: int
    """Global rank of the last pipeline stage among the ranks that share this rank's pipeline."""
    megatron: dict[str, Any] = field(repr=False)
    """Megatron's record of this mesh: the global variables of `parallel_state`."""

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_sequence_parallel(self) -> bool:
        return self.layout.sequence_parallel

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let Megatron's functions see this mesh inside the block; needed where a process has two meshes."""
        before = _megatron_state()
        vars(parallel_state).update(self.megatron)
        try:
            yield
        finally:
            vars(parallel_state).update(before)


def _megatron_state() -> dict[str, Any]:
    """Return Megatron's record of the present mesh."""
    return {name: value for name, value in vars(parallel_state).items() if name[0] == "_" and name.isupper()}


@contextmanager
def no_mesh() -> Iterator[None]:
    """Let Megatron forget its mesh inside the block, so that a second mesh can be made; then restore the first."""
    before = _megatron_state()
    vars(parallel_state).update({name: {} if isinstance(value, dict) else None for name, value in before.items()})
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def current_mesh(layout: ParallelConfig) -> Mesh:
    """Return the mesh that `start_mesh` has made of this layout."""
    ps = parallel_state
    return Mesh(
        layout=layout,
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=ps.get_tensor_model_parallel_world_size(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_size=ps.get_pipeline_model_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
        cp_size=ps.get_context_parallel_world_size(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        ep_size=ps.get_expert_model_parallel_world_size(),
        tp_group=ps.get_tensor_model_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
        cp_group=ps.get_context_parallel_group(),
        dp_cp_group=ps.get_data_parallel_group(with_context_parallel=True),
        ep_group=ps.get_expert_model_parallel_group(),
        expert_dp_group=ps.get_expert_data_parallel_group(),
        last_stage_rank=ps.get_pipeline_model_parallel_last_rank(),
        megatron=_megatron_state(),
    )
