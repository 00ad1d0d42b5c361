"""Taps keep what flows into or out of modules during a forward pass, and put its parts together over the ranks.

Shape suffixes: S sequence (of a context-parallel rank), B batch, E channels of the tapped tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum
from compactlm_nemo.parallel.mesh import Mesh


class Taps:
    """Hooks keep the inputs or outputs of modules under a name, those of the last micro-batch alone."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def input(self, module: Any, name: str) -> None:
        """Keep the first argument of the module."""

        def keep(module: Any, args: Any) -> None:
            self.seen[name] = args[0].detach()

        self.handles.append(module.register_forward_pre_hook(keep))

    def output(self, module: Any, name: str) -> None:
        """Keep the output of the module, of several the first."""

        def keep(module: Any, args: Any, out: Any) -> None:
            self.seen[name] = (out[0] if isinstance(out, tuple) else out).detach()

        self.handles.append(module.register_forward_hook(keep))

    def pop(self, name: str) -> Tensor | None:
        """Give a tensor away; None where this rank did not run the module."""
        return self.seen.pop(name, None)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def whole_over_tp(x_SBE: Tensor, mesh: Mesh, *, is_sharded: bool) -> Tensor:
    """Put a tensor together over the tensor-parallel ranks, `[S, B, E]` on each of them.

    Args:
        is_sharded: Whether each rank has a part of E. Otherwise ranks have a part of S under sequence parallelism, and
            else the whole tensor.
    """
    if is_sharded:
        return all_gather(x_SBE, mesh.tp_group, dim=-1)
    return all_gather(x_SBE, mesh.tp_group, dim=0) if mesh.is_sequence_parallel else x_SBE


def on_every_stage(
    x_SBE: Tensor | None, mesh: Mesh, *, tokens_BS: Tensor, width: int, is_sharded: bool = False
) -> Tensor:
    """Send a tapped tensor to all pipeline stages, `[S, B, E]` float32 on each of them. Collective.

    Args:
        x_SBE: The tensor on the ranks of the stage that has it, as `whole_over_tp` takes it; None elsewhere.
        tokens_BS: The micro-batch, whose sequences are whole.
        width: E.
    """
    if x_SBE is None:
        batch, length = tokens_BS.shape
        x_SBE = torch.zeros(length // mesh.cp_size, batch, width, device=tokens_BS.device)
    else:
        x_SBE = whole_over_tp(x_SBE, mesh, is_sharded=is_sharded)
    return all_reduce_sum(x_SBE.float(), mesh.pp_group)
