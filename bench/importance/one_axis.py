"""Scoring that hooks only the modules of one axis, to see what each costs; the package always measures all of them."""

from __future__ import annotations

from typing import Any

from compactlm_nemo.importance.activations import ActivationHooks

AXES = {
    "heads": ("linear_proj",),
    "mlp": ("linear_fc2",),
    "hidden": ("input_layernorm", "pre_mlp_layernorm", "final_layernorm"),
}
"""Axis -> last part of the names of the modules it is measured at; heads are measured together with query groups."""


class OneAxis(ActivationHooks):
    """The package's hooks, less those that sit on modules of other axes."""

    def __init__(self, axis: str, sequence_length: int, chunk: Any, *args: Any) -> None:
        super().__init__(chunk, *args)
        self.length = sequence_length  # otherwise the hooks of the norms set it
        modules = [module for name, module in chunk.named_modules() if name.split(".")[-1] in AXES[axis]]
        tables = [table for module in modules for table in (module._forward_hooks, module._forward_pre_hooks)]
        wanted = [handle for handle in self.handles if any(handle.hooks_dict_ref() is table for table in tables)]
        for handle in self.handles:
            if handle not in wanted:
                handle.remove()
        self.handles = wanted
