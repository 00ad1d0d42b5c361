"""One rank of a cluster that is not there: tensors have shapes and no memory, collectives send nothing.

    with fake_world(ParallelConfig(tp=8), world=128, rank=0, seed=1) as there:
        model = build_model(dims, there.mesh, ...)
        there.meter.peak

What code would read from the device is 1 everywhere. A mask selects everything, so sizes that depend on values are
their largest; of experts, each gets as many tokens as when all get equally many. Objects are gathered as if every rank
had what this one has. Nothing here needs a GPU, and one that is there is not used: `hide_devices` comes first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.importance.aggregators import BLOCK_ELEMENTS
from compactlm_nemo.losses.vocabulary import Head
from compactlm_nemo.parallel.host import use_cpu
from compactlm_nemo.parallel.launch import start_mesh
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.planning.meter import Meter, group_of


@dataclass(frozen=True)
class FakeWorld:
    """The part of the cluster that one process sees."""

    mesh: Mesh
    meter: Meter
    is_gpu: bool = False
    """Whether a GPU's kernels compare logits, in a GPU's chunks."""


class _FakeMeter(Meter):
    """Answers what fake tensors cannot.

    Args:
        is_gpu: Whether collectives are NCCL's. Gloo's reduce-scatter sums a copy of what it is given.
    """

    def __init__(self, *, is_gpu: bool) -> None:
        super().__init__()
        self.is_gpu = is_gpu
        self.selected: int | None = None
        """Elements that a mask selects, where that is known."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls, and no work
            return args[0].fake_device
        return super().__torch_dispatch__(func, types, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            if "reduce_scatter" in name and not self.is_gpu:
                for copied in [torch.empty_like(x) for x in tree_leaves(args[1])]:
                    self._note(copied.untyped_storage())
            with _disable_current_modes():  # the handle of an operation that has ended
                handle = torch.ops.c10d.send([torch.zeros(1)], group_of(args), 0, 0)
            return (args[0], handle) if len(func._schema.returns) == 2 else handle
        if name == "aten::_local_scalar_dense":
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else dtype == torch.bool or 1
        if name == "aten::equal":
            return args[0].shape == args[1].shape
        if name == "aten::nonzero":
            return args[0].new_zeros((args[0].numel(), args[0].dim()), dtype=torch.long)
        if name == "aten::masked_select":
            count = self.selected or torch.broadcast_shapes(args[0].shape, args[1].shape).numel()
            return args[0].new_zeros(count)
        if name == "aten::bincount":
            size = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return args[0].new_zeros(max(size, 1), dtype=torch.long)
        return func(*args, **kwargs)


def _adding_up(sizes: list[int], total: int) -> list[int]:
    """Return sizes that were read from a fake tensor as equal ones that add up; others as they are."""
    return sizes if sum(sizes) == total else _shares(total, len(sizes))


def _shares(total: int, count: int) -> list[int]:
    share, rest = divmod(total, count)
    return [share + (part < rest) for part in range(count)]


class _PythonCalls(TorchFunctionMode):
    """Lets `torch.tensor([...])` take fake tensors, whose values it would read past every dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor:
            args = tree_map(lambda x: x.item() if isinstance(x, Tensor) else x, args)
        return func(*args, **(kwargs or {}))


def hide_devices() -> None:
    """Let this process see no GPU; before torch first looks for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _object_collectives() -> dict[str, Any]:
    """Return stand-ins, with the names of arguments that torch's functions have."""

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, **_: Any) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def broadcast_object_list(object_list: list[Any], *_: Any, **__: Any) -> None: ...

    return {f.__name__: f for f in (gather_object, all_gather_object, broadcast_object_list)}


@contextlib.contextmanager
def fake_world(
    layout: ParallelConfig, *, world: int, rank: int, seed: int, is_gpu: bool = False
) -> Iterator[FakeWorld]:  # fmt: skip
    """Be one rank of a cluster for the body."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import token_dispatcher
    from torch.testing._internal.distributed.fake_pg import FakeStore

    use_cpu()
    torch_new_group = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return torch_new_group(*args, **{**kwargs, "backend": "fake"})

    with contextlib.ExitStack() as stack:
        place = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": "0"}
        stack.enter_context(mock.patch.dict(os.environ, place))
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        for name, stand_in in {"new_group": new_group, **_object_collectives()}.items():
            for module in (dist, dist.distributed_c10d):
                stack.enter_context(mock.patch.object(module, name, stand_in))
        # All is on the one device; moves of fake parameters fail.
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", _tolist))
        stack.enter_context(mock.patch.object(FakeTensor, "numpy", _numpy))
        stack.enter_context(mock.patch.object(torch, "split", _splitting(torch.split)))
        if is_gpu:
            stack.enter_context(mock.patch.object(Head, "is_fused", _is_fused))
            stack.enter_context(mock.patch.dict(BLOCK_ELEMENTS, cpu=BLOCK_ELEMENTS["cuda"]))
        stack.callback(parallel_state.destroy_model_parallel)
        mesh, meter = start_mesh(layout, seed), _FakeMeter(is_gpu=is_gpu)
        dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
        stack.enter_context(mock.patch.object(dispatcher, "preprocess", _evenly(dispatcher.preprocess)))
        stack.enter_context(mock.patch.object(token_dispatcher, "permute", _permuting(token_dispatcher.permute, meter)))
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), meter, _PythonCalls()):
            stack.enter_context(mode)
        yield FakeWorld(mesh, meter, is_gpu)


def _tolist(x: Tensor) -> Any:
    value: Any = 1.0 if x.dtype.is_floating_point else 1
    for size in reversed(x.shape):
        value = [value] * size
    return value


def _splitting(split: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.split` for sizes that were read from a fake tensor; a mode is not entered where layers run anew."""

    def evenly(x: Tensor, sizes: Any, dim: int = 0) -> Any:
        return split(x, _adding_up(sizes, x.shape[dim]) if isinstance(sizes, list) else sizes, dim)

    return evenly


def _numpy(x: Tensor, **_: Any) -> Any:
    return np.ones(tuple(x.shape))


def _evenly(preprocess: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return Megatron's count of the tokens that ranks send to each other's experts, with equally many for each."""

    def counted(dispatcher: Any, routing_map: Tensor) -> Tensor:
        tokens_per_expert = preprocess(dispatcher, routing_map)
        if dispatcher.input_splits is not None:
            splits = np.array(_shares(int(dispatcher.num_out_tokens), dispatcher.ep_size))
            dispatcher.input_splits = dispatcher.output_splits = splits
            dispatcher.output_splits_tp = None  # of equal parts
        return tokens_per_expert

    return counted


def _permuting(permute: Callable[..., Any], meter: _FakeMeter) -> Callable[..., Any]:
    """Return Megatron's order of tokens by experts, whose mask selects as many tokens as its caller says."""

    def permuted(*args: Any, num_out_tokens: int, **kwargs: Any) -> Any:
        meter.selected = num_out_tokens
        try:
            return permute(*args, num_out_tokens=num_out_tokens, **kwargs)
        finally:
            meter.selected = None

    return permuted


def _is_fused(head: Head, hidden_NH: Tensor) -> bool:
    return hidden_NH.dtype != torch.float64
