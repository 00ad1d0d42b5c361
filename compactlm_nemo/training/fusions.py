"""Finds the fused kernels of installed libraries that training can use, and switches those on that ask for it.

Which optimizer Megatron-Core takes is its own choice: Transformer Engine's, else apex', else torch's.
"""

from __future__ import annotations

import importlib
from enum import Enum
from typing import Any

import megatron.core.optimizer
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class Fusion(Enum):
    """A fused kernel, by the name under which it is printed."""

    transformer_engine_adam = "Transformer Engine FusedAdam"
    apex_adam = "apex FusedAdam"
    torch_adam = "torch fused AdamW"
    gradient_accumulation = "gradient accumulation"


_ADAMS = {"transformer_engine": Fusion.transformer_engine_adam, "apex": Fusion.apex_adam}


def available_fusions(*, is_cuda: bool) -> list[Fusion]:
    """Return the fusions that training uses in this process.

    Args:
        is_cuda: Whether the model lies on a CUDA device: apex' accumulation of weight gradients runs there only, and
            torch's own fused Adam is taken there only.
    """
    library = getattr(megatron.core.optimizer, "Adam").__module__.partition(".")[0]  # noqa: B009  not typed as a member
    fusions = [_ADAMS[library]] if library in _ADAMS else [Fusion.torch_adam] * is_cuda
    return fusions + [Fusion.gradient_accumulation] * (is_cuda and _is_importable("fused_weight_gradient_mlp_cuda"))


def fusions_text(fusions: list[Fusion]) -> str:
    """Return the names of the fusions, or none."""
    return ", ".join(fusion.value for fusion in fusions) or "none"


def fuse_gradient_accumulation(chunks: list[Any]) -> None:
    """Let the linear layers of chunks in Megatron's DDP add their weight gradients to the float32 sum by themselves.

    Without it each micro-batch writes a gradient of the weights' dtype, and reads it and the sum to add it. Only a
    model in DDP has the sum, `main_grad`. A compiled layer's graph ends at such a layer, whose backward pass it could
    not follow.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                module.gradient_accumulation_fusion = True
                module.forward = torch.compiler.disable(module.forward)


def use_torch_fused_adam(optimizer: Any) -> None:
    """Let torch's AdamW move all weights of a group by one kernel; its default makes copies of its state."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


def _is_importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
