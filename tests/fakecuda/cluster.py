"""A cluster that is not there: any number of ranks, of which this process is one, on fake devices.

    with cluster(world=8, tp=8, sequence_parallel=True) as there:
        model = build_model(dims, there.mesh, ...)
        there.counts.clear()
        ...
        assert not there.counts.synchronisations

Collectives do nothing. Those of objects answer as if every rank had what this rank has, unless `gathered` says what the
ranks have.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.parallel import host
from compactlm_nemo.parallel.launch import start_mesh
from compactlm_nemo.parallel.mesh import Mesh
from tests.fakecuda.counts import Counts
from tests.fakecuda.device import IS_HERE, REASON, FakeDevice, fake_module_to, let_be


def skip_without_fake_cuda() -> None:
    """Skip the test module where there is no fake CUDA."""
    if not IS_HERE:
        pytest.skip(REASON, allow_module_level=True)


@dataclass(frozen=True)
class Cluster:
    """The part of the cluster that one process sees."""

    mesh: Mesh
    device: FakeDevice

    @property
    def counts(self) -> Counts:
        return self.device.counts


Gathered = Callable[[Any], list[Any]]
"""This rank's object -> those of all ranks."""


def _object_collectives(world: int, gathered: Gathered | None) -> dict[str, Any]:
    """Return the stand-ins, with the names of arguments that torch's functions have.

    Where another rank has gathered objects and sends them on, this rank gets what it would have gathered.
    """
    gathered_elsewhere: list[Any] = []

    def ranks(obj: Any, size: int) -> list[Any]:
        return gathered(obj) if gathered and size == world else [obj] * size

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, **_: Any) -> None:
        gathered_elsewhere[:] = ranks(obj, world) if object_gather_list is None else []
        if object_gather_list is not None:
            object_gather_list[:] = ranks(obj, len(object_gather_list))

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = ranks(obj, len(object_list))

    def broadcast_object_list(object_list: list[Any], *_: Any, **__: Any) -> None:
        if object_list == [[]] and gathered_elsewhere:
            object_list[0] = list(gathered_elsewhere)

    def scatter_object_list(
        scatter_object_output_list: list[Any], scatter_object_input_list: list[Any] | None = None, **_: Any
    ) -> None:
        scatter_object_output_list[0] = (scatter_object_input_list or [None])[0]

    return {function.__name__: function for function in (
        gather_object, all_gather_object, broadcast_object_list, scatter_object_list,
    )}  # fmt: skip


def _sizes_of_dispatch(preprocess: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the stand-in for what a dispatcher counts: as every mask selects all, all tokens go to every expert."""

    def stand_in(dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert = preprocess(dispatcher, routing_map)
        tokens = routing_map.shape[0]
        sent = tokens * dispatcher.num_local_experts
        sizes = [
            (tokens_per_expert, tokens * dispatcher.tp_size * dispatcher.ep_size),
            (dispatcher.input_splits, sent),
            (dispatcher.output_splits, sent),
            (dispatcher.output_splits_tp, sent * dispatcher.ep_size),
        ]
        if dispatcher.num_local_experts > 1:
            sizes.append((dispatcher.num_global_tokens_per_local_expert, tokens))
        for tensor, size in sizes:
            if tensor is not None:
                let_be(tensor, torch.full(tensor.shape, size))
        return tokens_per_expert

    return stand_in


@contextlib.contextmanager
def cluster(world: int = 1, rank: int = 0, *, gathered: Gathered | None = None, **layout: Any) -> Iterator[Cluster]:
    """Be one rank of a cluster for the body.

    Args:
        world: Ranks.
        rank: The one that this process is.
        gathered: What all ranks have, from what this one has, wherever objects are gathered from all ranks.
        layout: Fields of `ParallelConfig`.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from torch.testing._internal.distributed.fake_pg import FakeStore

    host.use_cpu()  # as `launched` does; no part of the CPU's stand-ins may be there
    assert host._mode is None
    device, torch_new_group = FakeDevice(), dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        group = torch_new_group(*args, **{**kwargs, "backend": "fake"})
        if kwargs.get("backend") == "gloo" and group is not dist.GroupMember.NON_GROUP_MEMBER:
            device.host_groups.add(group.group_name)
        return group

    with contextlib.ExitStack() as stack:
        place = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank % 8)}
        stack.enter_context(mock.patch.dict(os.environ, place))
        torch.cuda.set_device(rank % 8)
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        for name, stand_in in {"new_group": new_group, **_object_collectives(world, gathered)}.items():
            for module in (dist, dist.distributed_c10d):
                stack.enter_context(mock.patch.object(module, name, stand_in))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", fake_module_to))
        for waiting in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(mock.patch.object(waiting, "synchronize", device.synchronize))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda self: self.cpu().tolist()))
        stack.enter_context(mock.patch.object(torch, "save", _save))
        sizes = _sizes_of_dispatch(MoEAlltoAllTokenDispatcher.preprocess)
        stack.enter_context(mock.patch.object(MoEAlltoAllTokenDispatcher, "preprocess", sizes))
        stack.callback(parallel_state.destroy_model_parallel)
        mesh = start_mesh(ParallelConfig(**layout), seed=1)
        stack.enter_context(device)
        yield Cluster(mesh, device)


_torch_save = torch.save


def _save(obj: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for `torch.save`, to which a fake tensor has no values to give."""
    on_host = tree_map(lambda x: x.cpu() if isinstance(x, FakeTensor) else x, obj)
    _torch_save(on_host, *args, **kwargs)
