"""Starts the process group and the mesh: nccl where CUDA is, gloo elsewhere, one process or torchrun alike."""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from compactlm_nemo.config.hardware import has_cuda
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.errors import OtherRankError
from compactlm_nemo.parallel.children import end_children_with_this_process
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.host import use_cpu
from compactlm_nemo.parallel.interruption import listening
from compactlm_nemo.parallel.world import is_main_rank, launch_world_size

if TYPE_CHECKING:
    from compactlm_nemo.parallel.mesh import Mesh


MAIN_RANK_WORK = timedelta(hours=12)
"""Ranks wait this long for work of the main rank alone (tokenising, tasks). Training uses Megatron's groups, whose
timeout is 30 minutes."""

_launches = itertools.count()
"""Numbers the process groups of this process, one after another; all ranks count alike."""


@contextmanager
def main_rank_writes() -> Iterator[bool]:
    """Yield True on the rank that writes plain files; other ranks wait for that rank's block and fail if it fails."""
    problem: str | None = None
    try:
        yield is_main_rank()
    except Exception as error:
        problem = str(error) or type(error).__name__
        raise
    finally:
        problem_on_main = broadcast_object(problem)
        if problem_on_main is not None and not is_main_rank():
            raise OtherRankError(problem_on_main)


def start_mesh(layout: ParallelConfig, seed: int) -> Mesh:
    """Make Megatron's groups in an initialised process group, seed every parallel RNG, and return the mesh."""
    from megatron.core import parallel_state, tensor_parallel

    from compactlm_nemo.parallel.mesh import current_mesh

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return current_mesh(layout)


def second_mesh(layout: ParallelConfig, seed: int) -> Mesh:
    """Make a second mesh over these processes; Megatron goes on seeing the first one outside `Mesh.active`."""
    from compactlm_nemo.parallel.mesh import no_mesh

    rng = torch.get_rng_state()
    with no_mesh():
        mesh = start_mesh(layout, seed)
    torch.set_rng_state(rng)
    return mesh


@contextmanager
def launched(layout: ParallelConfig, seed: int, deadline: float | None = None) -> Iterator[Mesh]:
    """Start the process group and the mesh for the body, and take both down afterwards.

    Args:
        deadline: When this job ends, seconds since the epoch; see `interruption`.
    """
    from megatron.core import parallel_state

    use_cpu()
    end_children_with_this_process()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if has_cuda() != torch.cuda.is_available():
        warnings.warn(
            f"torch.cuda.is_available() is {torch.cuda.is_available()} here, which model.precision=auto did not "
            "expect; set model.precision to bf16 or fp32.",
            stacklevel=2,
        )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # No `device_id`: with it every group is split off this one by all of its ranks, and Megatron's gloo groups, whose
    # members do not split, would wait for ever.
    with tempfile.TemporaryDirectory() as folder:
        if launch_world_size() == 1:
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        else:
            # The store of torchrun outlives a group: a second one must not find the addresses of the first.
            store, rank, size = next(rendezvous("env://", timeout=MAIN_RANK_WORK))
            store = PrefixStore(f"launch_{next(_launches)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=MAIN_RANK_WORK)
        try:
            with listening(deadline):
                yield start_mesh(layout, seed)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
