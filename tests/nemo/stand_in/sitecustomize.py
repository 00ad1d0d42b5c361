"""What NeMo 2 asks of CUDA where it would do nothing on a CPU; Python runs this file when it starts.

Put the folder on `PYTHONPATH`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function make on the CPU what it is asked to make on the present device."""

    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if type(device) is int or str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


for _name in ("synchronize", "empty_cache", "Stream", "set_device"):
    setattr(torch.cuda, _name, lambda *_, **__: None)
torch.cuda.current_device = lambda: 0
torch.cuda.is_initialized = lambda: True
for _name in ("arange", "empty", "tensor", "zeros", "ones"):
    setattr(torch, _name, _on_cpu(getattr(torch, _name)))
