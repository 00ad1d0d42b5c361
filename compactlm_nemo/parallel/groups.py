"""The device mesh as plain values: the only reader of Megatron's `parallel_state`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's place: ranks, sizes and groups of each parallel axis."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage among the ranks that share this rank's pipeline."""
        return parallel_state.get_pipeline_model_parallel_last_rank()


def current_mesh() -> Mesh:
    """The mesh that `launch` made."""
    ps = parallel_state
    return Mesh(
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=ps.get_tensor_model_parallel_world_size(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_size=ps.get_pipeline_model_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        tp_group=ps.get_tensor_model_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
    )
