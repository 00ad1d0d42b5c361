"""Makes Megatron-Core run on a machine without CUDA.

Megatron-Core names the CUDA device in its source: `device="cuda"`, `torch.cuda.current_device()`, streams, RNG states,
`param.type() == "torch.cuda.FloatTensor"`. On a CPU this module gives these names a CPU meaning, so that
Megatron-Core's schedules, optimizer and checkpoints run unchanged on gloo. No other module replaces functions of
another library; where CUDA is available this one adds a name that Megatron-Core lacks without Transformer Engine, and
lets the process that trains write its own checkpoints.
"""

from __future__ import annotations

import contextlib
import inspect
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _InertStream:
    """Stands for a CUDA stream: everything on a CPU is already ordered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record_event(self) -> _InertStream:
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Rewrites the device argument of torch calls, `Tensor.cuda()` and the names that `Tensor.type()` returns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):  # pinning is a copy to an accelerator's memory and fails without one
            kwargs = {**kwargs, "pin_memory": False}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


@contextlib.contextmanager
def _no_stream(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _undo_megatron_fusions() -> None:
    """Put plain functions where Megatron-Core wrapped its own in `torch.compile`.

    On a CPU Inductor would compile C++ for minutes at the first call. These two are the ones that our models call;
    what this package compiles itself (`torch.compile` of a layer) is not touched. Megatron's own switch,
    `jit.disable_jit_fuser`, is missing in 0.15 and acts only on modules that are imported after it.
    """
    from megatron.core import activations
    from megatron.core.transformer.moe.router import TopKRouter

    for owner, name in ((activations, "squared_relu"), (TopKRouter, "_apply_expert_bias")):
        if name in vars(owner):  # Megatron-Core 0.15 does the router's sum elsewhere, uncompiled
            setattr(owner, name, inspect.unwrap(getattr(owner, name)))


def _write_checkpoints_in_this_process() -> None:
    """Let threads of this process write the files of Megatron-Core's checkpoints, each save with a queue of its own.

    Megatron's queue is that of a manager, made so that another process can write: one of 400 MB that takes seconds to
    start and stays behind when this one is killed. Older versions fork a process for each file besides, which may hang
    when other threads of this one hold locks; newer ones use threads, but lose what a file could not be written for. A
    queue that saves share would give the results of one to another that is written at the same time.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    for name in ("_get_write_results_queue", "get_write_results_queue"):  # the name in older and newer versions
        if name in vars(filesystem_async):
            setattr(filesystem_async, name, lambda *_: queue.Queue())
    for name in ("write_preloaded_data_multiproc", "write_preloaded_data_multithread"):
        if name in vars(filesystem_async.FileSystemWriterAsync):
            setattr(filesystem_async.FileSystemWriterAsync, name, staticmethod(_write_files))


def _write_files(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """Write each file of a checkpoint in a thread, in the place of Megatron's function.

    What the threads wrote, by their numbers, or the first failure goes into `results`.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(number: int, bucket: Any) -> tuple[int, list[Any] | Exception]:
        written: queue.Queue[Any] = queue.Queue()
        left: queue.Queue[int] = queue.Queue()  # that Megatron counts what is done in
        left.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, written, left, True, use_msc=use_msc)
        result: tuple[int, list[Any] | Exception] = written.get_nowait()
        return result

    with ThreadPoolExecutor(len(buckets)) as threads:
        by_number = dict(threads.map(write, range(len(buckets)), buckets))
    failures = [result for result in by_number.values() if isinstance(result, Exception)]
    results.put(failures[0] if failures else by_number)


def _host_values(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """Return what Megatron's function of that purpose copies from a device: a collective takes no tensor as sizes."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _gather_parts(part: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """Return the parts of all ranks, `sizes` rows each, one after another; gloo gathers none but equal ones."""
    whole = part.new_zeros(sum(sizes), *part.shape[1:])
    whole.split(sizes)[group.rank()].copy_(part)
    dist.all_reduce(whole, group=group)
    return whole


def _sum_own_part(whole: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """Return this rank's rows of the sum over the ranks, rank r has `sizes[r]`; gloo scatters none but equal parts."""
    total = whole.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].clone()


def _unless_uneven(megatron: Callable[..., Any], uneven: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's collective along the first dimension, and `uneven` where the sizes of the parts are given."""

    def collective(x: torch.Tensor, group: Any, sizes: list[int] | None = None, *buffer: Any, **named: Any) -> Any:
        if sizes is None or group.size() == 1:
            return megatron(x, group, sizes, *buffer, **named)
        return uneven(x, group, sizes)

    return collective


_mode: _CudaNamesMeanCpu | None = None


def use_cpu() -> None:
    """Make Megatron-Core run in this process: on the CPU, or where CUDA is without Transformer Engine."""
    global _mode
    from megatron.core.transformer.moe import moe_utils

    # A router tests this name, which Megatron-Core only imports together with Transformer Engine.
    vars(moe_utils).setdefault("te_general_gemm", None)
    _write_checkpoints_in_this_process()
    if _mode is not None or torch.cuda.is_available():
        return
    import megatron.core.models.gpt.gpt_model  # noqa: F401  before the names change: it reads them when imported
    import megatron.core.optimizer  # noqa: F401

    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.get_rng_state = _cpu_rng_state
    torch.cuda.set_rng_state = _set_cpu_rng_state  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.Stream = torch.cuda.Event = _InertStream  # type: ignore[misc,assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = _InertStream  # type: ignore[assignment]
    torch.cuda.stream = _no_stream  # type: ignore[assignment]
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    megatron_random._get_cuda_rng_state = _cpu_rng_state
    megatron_random._set_cuda_rng_state = _set_cpu_rng_state
    token_dispatcher.maybe_move_tensor_to_cpu = _host_values
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    mappings._gather_along_first_dim = _unless_uneven(gather, _gather_parts)
    mappings._reduce_scatter_along_first_dim = _unless_uneven(reduce_scatter, _sum_own_part)
    _undo_megatron_fusions()
    _mode = _CudaNamesMeanCpu()
    _mode.__enter__()
