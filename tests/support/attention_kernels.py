"""Which kernels attention runs, by name."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class AttentionKernels(TorchDispatchMode):
    """Remembers the attention kernels, and that of a softmax, which only attention without a fused kernel runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if "attention" in name or "softmax" in name:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))
