"""Counts what tensors occupy and what is done to them, whether they are real or have shapes alone.

Memory is that of storages: what tensors share counts once, from the operation that made it until its last tensor is
gone. What other libraries allocate beside torch is not seen, nor what an allocator keeps.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

TEMPORARY = "temporary"
_OURS = (f"{os.sep}compactlm_nemo{os.sep}", f"{os.sep}megatron{os.sep}")
_BETWEEN = (f"planning{os.sep}meter.py", f"planning{os.sep}fake_world.py", f"parallel{os.sep}host.py")
_ADDS_PRODUCT = "::add_product"
"""Of losses/kernels.py, the gradient of the head: to a float32 sum [V, H] it adds a product of [N, V] and [N, H]."""
_NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "set_"}
"""Operations that neither read nor write memory."""


class Product(NamedTuple):
    """A matrix product or attention."""

    kind: str
    """matmul or attention."""
    dtype: str
    flops: int
    bytes: int
    """Read and written."""


@dataclass
class Work:
    """What a device is given to do."""

    products: Counter[Product] = field(default_factory=Counter)
    """Matrix products and attention: how many there are of each."""
    other_bytes: int = 0
    """What all other kernels read and write, one by one: a compiler that joins them saves a part."""
    kernels: int = 0
    sent: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """(operation, group, its ranks) -> bytes of the tensor that a rank puts in or gets, the larger of the two."""

    @property
    def total_flops(self) -> int:
        return sum(product.flops * count for product, count in self.products.items())

    def plus(self, other: Work, times: float = 1) -> Work:
        """Return the sum with `times` another's."""
        return Work(
            products=_plus(self.products, other.products, times),
            other_bytes=round(self.other_bytes + times * other.other_bytes),
            kernels=round(self.kernels + times * other.kernels),
            sent=_plus(self.sent, other.sent, times),
        )


def _plus(one: Counter[Any], other: Counter[Any], times: float) -> Counter[Any]:
    return Counter({key: round(one[key] + times * other[key]) for key in one | other})


@dataclass
class Peak:
    """The moment at which most bytes were alive."""

    bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    place: str = ""
    """Line of the package or of Megatron that made the last of them."""


class Meter(TorchDispatchMode):
    """Counts, while it is entered, in this thread: `work` from the last `start_work` on, `peak` from `start_peak` on.

    A new storage is of kind `kind`; `name` gives those of tensors another, `keep` all temporary ones of late.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = TEMPORARY
        self.work, self.peak = Work(), Peak()
        self.curve: list[tuple[int, dict[str, int]]] | None = None
        """Where a list is set: (bytes alive, by kind) after each operation that changed them."""
        self._live: Counter[str] = Counter()
        self._bytes = 0
        self._storages: dict[int, tuple[int, str]] = {}
        self._recent: set[int] = set()

    @property
    def live(self) -> dict[str, int]:
        """Bytes alive now, by kind."""
        return {kind: count for kind, count in self._live.items() if count}

    def start_peak(self) -> None:
        """Look for the peak anew, from what is alive now."""
        self.peak = Peak(self._bytes, self.live, _place())

    def start_work(self) -> None:
        """Count work anew."""
        self.work = Work()

    def name(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Let the storages of tensors be of a kind; one that was made before the meter ran counts from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._note(storage)
            self._rename(storage._cdata, kind)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Let the storages of tensors count as nothing: they lie in the memory of others, which count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage._cdata not in self._storages:
                self._storages[storage._cdata] = 0, self.kind
                weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def keep(self, kind: str) -> None:
        """Let temporary storages that were made since the last call, and are alive, be of a kind."""
        for key in self._recent:
            if self._storages.get(key, (0, ""))[1] == TEMPORARY:
                self._rename(key, kind)
        self._recent.clear()

    def _rename(self, key: int, kind: str) -> None:
        size, before = self._storages.get(key, (0, kind))
        self._live[before] -= size
        self._live[kind] += size
        if size:
            self._storages[key] = size, kind

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._storages:
            return
        self._storages[key] = size, self.kind
        self._recent.add(key)
        self._live[self.kind] += size
        self._bytes += size
        weakref.finalize(storage, self._forget, key).atexit = False
        if self._bytes > self.peak.bytes:
            self.peak = Peak(self._bytes, self.live, _place())
        if self.curve is not None:
            self.curve.append((self._bytes, self.live))

    def _forget(self, key: int) -> None:
        size, kind = self._storages.pop(key)
        self._recent.discard(key)
        self._live[kind] -= size
        self._bytes -= size
        if self.curve is not None:
            self.curve.append((self._bytes, self.live))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.run(func, args, kwargs or {})
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._note(tensor.untyped_storage())
        name = func._schema.name
        if name.startswith("c10d::"):
            self._count_collective(name.removeprefix("c10d::").strip("_"), args)
        elif not name.startswith("prim::") and not _is_view(func):
            self._count_kernel(func, args, kwargs or {}, out, outputs)
        return out

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do the operation itself."""
        return func(*args, **kwargs)

    def _count_kernel(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any, outputs: list[Tensor]) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moved = sum(map(_touched_bytes, inputs + outputs))
        self.work.kernels += 1
        flops = _flops(func, args, kwargs, out)
        if flops is None:
            self.work.other_bytes += moved
        else:
            name = func._schema.name
            factor = inputs[name.endswith(_ADDS_PRODUCT)]
            kind = "attention" if "attention" in name else "matmul"
            self.work.products[Product(kind, str(factor.dtype).removeprefix("torch."), flops, moved)] += 1

    def _count_collective(self, name: str, args: Any) -> None:
        group = dist.ProcessGroup.unbox(group_of(args))
        sizes = [sum(map(_touched_bytes, _tensors(part))) for part in args]
        if group.size() > 1:
            self.work.sent[name, group.group_desc.lower().removesuffix("_group"), group.size()] += max(sizes)


def group_of(args: Any) -> Any:
    """Return the process group among the arguments of a collective."""
    return next(x for x in tree_leaves(args) if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))


def _tensors(part: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)]


def _is_view(func: Any) -> bool:
    """Whether an operation only gives another look at the memory of its argument, or none at all."""
    name, returns = func._schema.name.partition("::")[2], func._schema.returns
    aliases = bool(returns) and all(value.alias_info and not value.alias_info.is_write for value in returns)
    return aliases or name in _NO_KERNEL


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int | None:
    """Return the FLOPs of a matrix product or of attention; None for any other kernel."""
    name = func._schema.name
    if name.endswith(_ADDS_PRODUCT):
        return 2 * int(args[1].numel()) * int(args[2].shape[1])
    if "attention" in name:
        return _attention_flops(func, args, kwargs)
    packet = func._overloadpacket
    if name.endswith("_"):  # in place: torch counts the operation of the same name that is not
        packet = getattr(torch.ops.aten, name.removeprefix("aten::").removesuffix("_"), packet)
    count = flop_registry.get(packet)
    return None if count is None else int(count(*args, **kwargs, out_val=out))


def _attention_flops(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Return the FLOPs of attention: two products forward, five backward, of the keys before a query where causal."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    query_BHSD, key_BGTD = given["query"], given["key"]
    num_queries, num_keys = query_BHSD.shape[2], key_BGTD.shape[2]
    products = 5 if "backward" in func._schema.name else 2
    every = products * 2 * query_BHSD.numel() * num_keys
    is_causal = given.get("is_causal") and num_queries == num_keys
    return every * (num_keys + 1) // (2 * num_keys) if is_causal else every


def _touched_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor in memory; expanded dimensions are there once."""
    numel = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numel *= size if stride or size <= 1 else 1
    return numel * x.element_size()


def _place() -> str:
    """Return the innermost line of the package or of Megatron that runs, apart from what stands between for all."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(part in path for part in _OURS) and not path.endswith(_BETWEEN):
            short = path.rpartition("site-packages" + os.sep)[2].rpartition("compactlm_nemo" + os.sep)[2]
            return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
