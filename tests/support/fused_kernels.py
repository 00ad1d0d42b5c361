"""Stands in for apex and Transformer Engine, whose kernels need CUDA: what Megatron-Core calls, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STUBS = {
    "apex": {
        "apex/__init__.py": "",
        "apex/optimizers.py": "from tests.support.fused_kernels import FusedAdam as _Adam, FusedSGD\n"
        "class FusedAdam(_Adam): ...\n",
        "apex/multi_tensor_apply.py": "from tests.support.fused_kernels import multi_tensor_applier\n",
        "amp_C.py": "from tests.support.fused_kernels import multi_tensor_l2norm, multi_tensor_scale\n",
        "fused_weight_gradient_mlp_cuda.py": "from tests.support.fused_kernels import wgrad_gemm_accum_fp32\n",
    },
    # Its optimizers alone: who finds more of it builds layers from it.
    "transformer_engine": {
        "sitecustomize.py": """
import sys, types

class Optimizers(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        from tests.support import fused_kernels

        found = getattr(fused_kernels, name)
        if name == "FusedAdam":
            found = type(name, (found,), {"__module__": self.__name__})
        setattr(self, name, found)
        return found

sys.modules["transformer_engine.pytorch.optimizers"] = Optimizers("transformer_engine.pytorch.optimizers")
""",
    },
}
"""Library -> the files that make it importable."""


def write_stubs(folder: Path, library: str) -> Path:
    """Make a folder that, on PYTHONPATH, makes the library importable."""
    for name, text in STUBS[library].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class FusedAdam(torch.optim.Optimizer):
    """AdamW, or Adam, that keeps its state as both libraries do: moments from the first step on, steps by group."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, adam_w_mode: bool
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        assert grad is not None and self.adam_w_mode
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.copy_(beta1 * mean + (1 - beta1) * grad)
        square.copy_(beta2 * square + (1 - beta2) * grad * grad)
        mean = mean / (1 - beta1 ** group["step"])
        square = square / (1 - beta2 ** group["step"])
        change = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter
        parameter.sub_(group["lr"] * change)


class FusedSGD(torch.optim.SGD):
    """Imported by Megatron-Core beside FusedAdam."""


def multi_tensor_applier(op: Callable[..., Any], overflow: Tensor, lists: list[list[Tensor]], *args: Any) -> Any:
    return op(2048, overflow, lists, *args)


def multi_tensor_l2norm(_: int, __: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    assert not per_tensor
    return torch.stack([tensor.norm() for tensor in lists[0]]).norm(), None


def multi_tensor_scale(_: int, __: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


calls: list[tuple[int, ...]] = []
"""Shapes of the weights whose gradients `wgrad_gemm_accum_fp32` has added."""


def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add `grad_output^T @ inputs` to the float32 gradient."""
    assert main_grad.dtype is torch.float32
    calls.append(tuple(main_grad.shape))
    main_grad.add_(grad_output.float().t() @ inputs.float())
