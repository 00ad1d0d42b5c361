"""This module alone calls torch.distributed collectives. No function changes its input.

A reduction runs over its `group`; None is the single rank that holds everything. The tensor must be on the
device of the group's backend (CUDA for nccl, CPU for gloo). Objects are pickled, and only ranks of
one launch exchange them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from compactlm_nemo.parallel.mesh import Mesh

T = TypeVar("T")


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum elementwise over the ranks of `group`, in the dtype and shape of `tensor`; no gradient flows through."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_reduce_max(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Take the elementwise maximum over `group`, in the dtype and shape of `tensor`; no gradient flows through."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def world_sum(tensor: Tensor) -> Tensor:
    """Sum elementwise over all ranks."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, dist.group.WORLD if dist.is_initialized() else None)


def move(tensor: Tensor, source: int, target: int, group: ProcessGroup) -> Tensor:
    """Send the tensor of rank `source` of `group` to rank `target`, which passes a tensor of equal shape and dtype.

    Only these two ranks call this function; rank `source` gets its tensor back.
    """
    ranks = [dist.get_global_rank(group, rank) for rank in (source, target)]
    tensor = tensor.detach().contiguous()
    if dist.get_rank() == ranks[0]:
        dist.send(tensor, ranks[1], group=group)
    else:
        tensor = torch.empty_like(tensor)
        dist.recv(tensor, ranks[0], group=group)
    return tensor


def broadcast_object(obj: T, group: ProcessGroup | None = None, src: int = 0) -> T:
    """Return the `obj` of global rank `src` on every rank of `group` (None: all ranks)."""
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src, group=group)
    return box[0]


def broadcast(tensor: Tensor, src: int, group: ProcessGroup) -> Tensor:
    """Return the tensor of global rank `src` on every rank of `group`; those of other ranks give shape and dtype."""
    is_source = dist.get_rank() == src
    out = tensor.detach().contiguous() if is_source else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.broadcast(out, src=src, group=group)
    return out


def send_receive(sends: Sequence[tuple[Tensor, int]], sources: Sequence[int], like: Tensor) -> list[Tensor]:
    """Send tensors to global ranks, and return one of each of the global ranks `sources`.

    All messages of a rank go at once, so that no order of the ranks can lock. Those between two ranks arrive in the
    order in which they are listed. No rank sends to itself.

    Args:
        like: Gives shape, dtype and device of every tensor.
    """
    received = [torch.empty_like(like, memory_format=torch.contiguous_format) for _ in sources]
    messages = [dist.P2POp(dist.isend, tensor.detach().contiguous(), rank) for tensor, rank in sends]
    messages += [dist.P2POp(dist.irecv, tensor, rank) for tensor, rank in zip(received, sources, strict=True)]
    for work in dist.batch_isend_irecv(messages) if messages else []:
        work.wait()
    return received


def all_gather_objects(obj: T) -> list[T]:
    """Return the `obj` of every rank in rank order, on every rank."""
    return broadcast_object(gather_objects(obj))


def gather_objects(obj: T) -> list[T]:
    """Return the `obj` of every rank in rank order on the main rank, and an empty list on the others."""
    if not dist.is_initialized():
        return [obj]
    boxes: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(obj, boxes)
    return boxes or []


def all_gather(tensor: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Concatenate the tensors of all ranks of `group`, of one shape, along `dim`; no gradient flows through."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def last_stage_total(total: Tensor, mesh: Mesh) -> Tensor:
    """Sum the last pipeline stage's `total` over data- and context-parallel ranks; the sum is on the CPU of every rank.

    The `total` of other stages only has to have the shape.
    """
    reduced = all_reduce_sum(total, mesh.dp_cp_group)
    if mesh.pp_size > 1:
        reduced = broadcast(reduced, mesh.last_stage_rank, mesh.pp_group)
    return reduced.cpu()  # the one place that waits for the device


def host_group() -> ProcessGroup | None:
    """Return a group of all ranks whose tensors are on the CPU; None stands for the default group. Collective."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return dist.new_group(backend="gloo")
    return None


def greatest(numbers: Sequence[int], group: ProcessGroup | None) -> list[int]:
    """Return the maximum over all ranks of each number; `group` is `host_group()`, so that no device is waited for."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(numbers)
    box = torch.tensor(numbers)
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=group)
    found: list[int] = box.tolist()
    return found


def barrier() -> None:
    """Return when every rank has called this function."""
    if dist.is_initialized():  # NCCL takes a device's number from the rank's unless it is told
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def _all_reduce(tensor: Tensor, op: Any, group: ProcessGroup | None) -> Tensor:
    # Contiguous: the backends reduce memory, not strides.
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    if group is not None:
        dist.all_reduce(out, op=op, group=group)
    return out
