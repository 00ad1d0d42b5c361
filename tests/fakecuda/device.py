"""A device that computes nothing: CUDA tensors are fake, CPU tensors are real, and what would happen is counted.

`FakeDevice` is a dispatch mode. An operation that touches CUDA runs in torch's `FakeTensorMode`, which gives shapes,
dtypes and devices and refuses tensors that lie on different devices; every other operation runs as always. So files,
indices and plans are real, and a model at full size costs nothing.

Not simulated: time, memory and its limit, NCCL, streams and their order, kernels written in Triton, compiled code, and
numbers: what comes back from the device is 1 everywhere, as is `.item()`, except from a tensor that was copied there
and not written since. A mask on the device selects everything, so sizes that depend on values are their largest; a
split into parts of such sizes makes equal ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from tests.fakecuda.counts import Collective, Copy, Counts, place

IS_HERE = torch.cuda.is_available() and torch.cuda.get_device_name().endswith("(stub)")
"""Whether this process has the fake devices of `build.sh`."""
REASON = "needs the fake CUDA devices of `make fakecuda`"

_MATH = "math"


_SAME = ("aten::detach", "aten::alias")


def let_be(x: Tensor, values: Tensor) -> None:
    """Let a tensor on the device have values, until it is written."""
    x.known = (values, x._version)  # type: ignore[attr-defined]


def _known(x: Any) -> Tensor | None:
    """Return the values of a tensor that was copied to the device and not written since."""
    values, version = getattr(x, "known", (None, None))
    return values if version == x._version else None


def is_view(func: Any) -> bool:
    """Whether an operation only gives another look at the memory of its argument, or none at all."""
    name = func._schema.name.partition("::")[2]
    returns = func._schema.returns
    aliases = bool(returns) and all(value.alias_info and not value.alias_info.is_write for value in returns)
    return aliases or name in _NO_KERNEL


_NO_KERNEL = {
    "_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
    "set_", "resize_", "record_stream", "detach_", "lift_fresh", "_local_scalar_dense", "_assert_async",
    "_linalg_check_errors", "_sharding_spec", "is_pinned", "sym_size", "_fused_sdp_choice",
}  # fmt: skip
_WRITES_ONLY = {"fill_", "zero_", "copy_", "normal_", "uniform_", "zeros", "ones", "full", "arange"}
"""Operations that do not read the tensor they write to."""


class FakeDevice(TorchDispatchMode):
    """Runs what touches CUDA without a device, and counts it in `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.counts = Counts()
        self.host_groups: set[str] = set()
        """Names of the groups whose collectives run on the host."""
        self._calls = _PythonCalls(self.counts)
        self._rules: dict[str, Callable[..., Any]] = {
            "aten::_local_scalar_dense": self._item,
            "aten::_to_copy": self._to_copy,
            "aten::copy_": self._copy_,
            "aten::index": self._index,
            "aten::_unsafe_index": self._index,
            "aten::index_put_": self._index,
            "aten::_index_put_impl_": self._index,
            "aten::nonzero": self._nonzero,
            "aten::masked_select": self._masked_select,
            "aten::equal": self._equal,
            "aten::bincount": self._bincount,
            "aten::_linalg_check_errors": self._check_errors,
            "aten::lift_fresh": self._lift_fresh,
            "aten::split_with_sizes": self._split,
        }

    def __enter__(self) -> FakeDevice:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "cuda" and torch.device(target).index is None:
            kwargs = {**kwargs, "device": torch.device("cuda", torch.cuda.current_device())}
        name = func._schema.name
        if name.startswith("c10d::"):
            return self._collective(func, args, tensors)
        if not (any(x.is_cuda for x in tensors) or (target is not None and torch.device(target).type == "cuda")):
            return func(*args, **kwargs)
        if name.startswith("prim::"):
            return self._run(func, args, kwargs)
        rule = self._rules.get(name)
        return self._kernel(func, args, kwargs) if rule is None else rule(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self.fake:
            return func(*args, **kwargs)

    def _kernel(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = self._run(func, args, kwargs)
        if is_view(func):
            if func._schema.name in _SAME and (known := _known(args[0])) is not None:
                out.known = (known, out._version)
            return out
        name = func._schema.name.partition("::")[2]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_cuda]
        if name in _WRITES_ONLY:
            inputs = inputs[1:]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not outputs:  # a list of tensors is changed in place
            outputs = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
        self.counts.kernels[name] += 1
        self.counts.kernel_bytes[name] += sum(map(_touched_bytes, inputs + outputs))
        if "attention" in name:
            self.counts.flops[name] += _attention_flops(name, args)
            self._calls.seen.append(name)
        elif name == "add_product":  # the package's own operator, which adds a weight gradient: [V, H], [N, V], [N, H]
            self.counts.flops[name] += 2 * args[1].numel() * args[2].shape[1]
        elif count := flop_registry.get(func._overloadpacket):
            self.counts.flops[name] += int(count(*args, **kwargs, out_val=out))
        return out

    def _wait(self) -> None:
        self.counts.synchronisations[place()] += 1

    def _item(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._wait()
        if (known := _known(args[0])) is not None:
            return known.item()
        dtype = args[0].dtype
        return 1.0 if dtype.is_floating_point else dtype == torch.bool or 1

    def _to_host(self, source: Tensor, dtype: torch.dtype | None, *, is_asynchronous: bool = False) -> Tensor:
        if not is_asynchronous:
            self._wait()
        if (known := _known(source)) is not None:
            return known.to(dtype or source.dtype, copy=True)
        return torch.ones(source.shape, dtype=dtype or source.dtype)

    def _to_device(self, source: Tensor, is_asynchronous: bool) -> None:
        self.counts.copies[Copy(place(), is_asynchronous, source.is_pinned())] += 1
        self.counts.copied_bytes += source.numel() * source.element_size()

    def _to_copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
        if source.is_cuda and target.type == "cpu":
            # Torch pins the memory of a copy that it makes without waiting: `pin_out` in TensorConversions.cpp.
            return self._to_host(source, kwargs.get("dtype"), is_asynchronous=bool(kwargs.get("non_blocking")))
        if not source.is_cuda and target.type == "cuda":
            self._to_device(source, bool(kwargs.get("non_blocking")))
            out = self._run(func, args, kwargs)
            out.known = (source.detach().to(out.dtype, copy=True), out._version)
            return out
        return self._kernel(func, args, kwargs)

    def _copy_(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source = args[:2]
        if source.is_cuda and not target.is_cuda:
            return target.copy_(self._to_host(source, target.dtype).expand_as(target))
        if target.is_cuda and not source.is_cuda:
            self._to_device(source, bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
            return self._run(func, args, kwargs)
        return self._kernel(func, args, kwargs)

    def _lift_fresh(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`torch.tensor(..., device="cuda")` copies before any mode sees it; the memory of the device is the host's."""
        (source,) = args
        out = self._run(func, args, kwargs)
        if not isinstance(source, FakeTensor):
            values = source.cpu()
            self._to_device(values, False)
            out.known = (values, out._version)
        elif (known := _known(source)) is not None:
            out.known = (known, out._version)
        return out

    def _index(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Torch copies indices on the host to the device, and looks up which entries of a mask are true."""
        source, indices, *others = args
        if not source.is_cuda and any(index is not None and index.is_cuda for index in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if others and _is_fill(indices, *others[:2]):
            return self._kernel(func, args, kwargs)
        expanded: list[Any] = []
        for index in indices:
            if index is None:
                expanded.append(None)
                continue
            if not index.is_cuda:
                self._to_device(index, False)
            if index.dtype not in (torch.bool, torch.uint8):
                expanded.append(index)
            elif index.is_cuda:
                self._wait()
                places = torch.zeros(index.numel(), dtype=torch.long, device=source.device)
                expanded += [places] * index.dim()
            else:
                expanded += index.nonzero().unbind(1)
        return self._kernel(func, (source, expanded, *others), kwargs)

    def _nonzero(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._wait()
        x = args[0]
        with self.fake:
            return torch.zeros(x.numel(), x.dim(), dtype=torch.long, device=x.device)

    def _masked_select(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._wait()
        with self.fake:
            return args[0].new_zeros(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())

    def _equal(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._wait()
        return args[0].shape == args[1].shape

    def _bincount(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._wait()
        size = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
        with self.fake:
            return torch.zeros(max(size, 1), dtype=torch.long, device=args[0].device)

    def _split(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Sizes that were read from the device are made up: parts that do not add up become equal ones."""
        x, sizes, dim = args[0], list(args[1]), args[2] if len(args) > 2 else 0
        if sum(sizes) != x.shape[dim]:
            share, rest = divmod(x.shape[dim], len(sizes))
            sizes = [share + (part < rest) for part in range(len(sizes))]
        return self._run(func, (x, sizes, dim), kwargs)

    def _check_errors(self, func: Any, args: Any, kwargs: Any) -> None:
        self._wait()

    def _collective(self, func: Any, args: Any, tensors: list[Tensor]) -> Any:
        """Count a collective and leave its tensors as they are; the handle is that of one that has ended."""
        group = next(x for x in tree_leaves(args) if isinstance(x, torch.ScriptObject) and _is_group(x))
        handle = torch.ops.c10d.send([torch.zeros(1)], group, 0, 0)
        ranks, name = dist.ProcessGroup.unbox(group), func._schema.name.removeprefix("c10d::").strip("_")
        if name != "barrier" and ranks.group_name not in self.host_groups and not all(x.is_cuda for x in tensors):
            raise RuntimeError(f"No backend type associated with device type cpu: {name} over {_group_name(ranks)}")
        sent = [sum(x.numel() * x.element_size() for x in tree_leaves(part) if isinstance(x, Tensor)) for part in args]
        key = Collective(name, _group_name(ranks), ranks.size(), str(tensors[0].dtype).removeprefix("torch."))
        self.counts.collectives[key] += 1
        self.counts.collective_bytes[key] += max(sent)
        if name == "barrier":
            self._wait()
        return (args[0], handle) if len(func._schema.returns) == 2 else handle

    def synchronize(self, *_: Any, **__: Any) -> None:
        """Stands for `torch.cuda.synchronize` and that of streams and events."""
        self._wait()


def _is_group(x: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(x._type())


def _is_fill(indices: list[Any], value: Tensor, accumulate: bool = False) -> bool:
    """Whether torch makes `x[mask] = number` a fill, which needs no look at the mask."""
    given = [index for index in indices if index is not None]
    is_one_mask = len(given) == 1 and given[0].dtype in (torch.bool, torch.uint8)
    return is_one_mask and value.numel() == 1 and not value.is_cuda and not accumulate


def _group_name(group: Any) -> str:
    name = group.group_desc.lower().removesuffix("_group")
    return {"undefined": "world", "default_pg": "world"}.get(name, name)


def _attention_flops(name: str, args: Any) -> int:
    """Return the FLOPs of attention without a mask: two products forward, five backward, grouped queries or not."""
    is_backward = "backward" in name
    query_BHSD, key_BGTD = args[1:3] if is_backward else args[:2]
    return (5 if is_backward else 2) * 2 * query_BHSD.numel() * key_BGTD.shape[2]


def _touched_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor in memory; expanded dimensions are there once."""
    numel = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numel *= size if stride or size <= 1 else 1
    return numel * x.element_size()


class _PythonCalls(TorchFunctionMode):
    """Sees what torch does before it dispatches: values in `torch.tensor([...])`, the kernel that attention chooses.

    The kernel of `scaled_dot_product_attention` is what it calls, and `math` where it calls none.
    """

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts, self.seen = counts, list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor:  # it reads tensors in a list one by one
            args = tree_map(lambda x: x.item() if isinstance(x, Tensor) else x, args)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.seen.clear()
        out = func(*args, **(kwargs or {}))
        self.counts.attention[self.seen[0].strip("_") if self.seen else _MATH] += 1
        return out


def fake_module_to(self: torch.nn.Module, target: Any, *_: Any, **__: Any) -> torch.nn.Module:
    """Stands for `Module.to`, which cannot change the memory of a fake parameter: new ones take their place."""

    def moved(x: Tensor) -> Tensor:
        return x if x.device.type == torch.device(target).type else x.detach().to(target)

    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (data := moved(parameter)) is not parameter:
                new = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
                vars(new).update(vars(parameter))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
    return self
