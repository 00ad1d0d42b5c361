"""The device mesh as plain values: the only reader of Megatron's `parallel_state`."""

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
    """This process's place: ranks, sizes and groups of each parallel axis.

    Data-parallel ranks hold different samples, context-parallel ranks parts of the same ones; expert-parallel ranks
    are neighbours among the data-parallel ones.
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
    """Ranks that hold the same experts."""
    last_stage_rank: int
    """Global rank of the last pipeline stage among the ranks that share this rank's pipeline."""
    megatron: dict[str, Any] = field(repr=False)
    """What Megatron holds of this mesh."""

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
        """Megatron's own functions see this mesh inside; needed where a process has two."""
        before = _held()
        vars(parallel_state).update(self.megatron)
        try:
            yield
        finally:
            vars(parallel_state).update(before)


def _held() -> dict[str, Any]:
    """Megatron's record of the present mesh."""
    return {name: value for name, value in vars(parallel_state).items() if name[0] == "_" and name.isupper()}


@contextmanager
def no_mesh() -> Iterator[None]:
    """Inside, Megatron knows no mesh, so that a second one can be made; afterwards it knows the first again."""
    before = _held()
    vars(parallel_state).update({name: {} if isinstance(value, dict) else None for name, value in before.items()})
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def current_mesh(layout: ParallelConfig) -> Mesh:
    """The mesh that `launch` made of this layout."""
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
        megatron=_held(),
    )
