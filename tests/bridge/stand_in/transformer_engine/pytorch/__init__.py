"""The layers: what they are called with matters only where it decides a parameter's name, shape or number format."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from transformer_engine.pytorch import fp8


class _Layer(torch.nn.Module):
    """A layer that has a state of its own beside its parameters, empty without fp8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and not (isinstance(state, Tensor) and state.numel() == 0):
            raise RuntimeError(f"a state of fp8 where there is none: {state!r}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("this stands in for Transformer Engine where nothing is computed")

    def _add(self, name: str, *shape: int, dtype: torch.dtype | None) -> None:
        self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=dtype or torch.float32)))


class _Norm(_Layer):
    has_bias = False

    def __init__(self, hidden_size: int, *, params_dtype: torch.dtype | None = None, **rest: Any) -> None:
        super().__init__()
        self._add("weight", hidden_size, dtype=params_dtype)
        if self.has_bias:
            self._add("bias", hidden_size, dtype=params_dtype)


class RMSNorm(_Norm):
    pass


class LayerNorm(_Norm):
    has_bias = True


class Linear(_Layer):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        **rest: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.parallel_mode, self.tp_size, self.tp_rank = parallel_mode, tp_size, 0
        self._add("weight", out_features, in_features, dtype=params_dtype)
        if bias:
            self._add("bias", out_features, dtype=params_dtype)
        else:
            self.bias = torch.empty(0)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        normalization: str = "LayerNorm",
        params_dtype: torch.dtype | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **rest)
        self._add("layer_norm_weight", in_features, dtype=params_dtype)
        if normalization == "LayerNorm":
            self._add("layer_norm_bias", in_features, dtype=params_dtype)


class GroupedLinear(_Layer):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        **rest: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, bias
        self.in_features, self.out_features = in_features, out_features
        self.fp8, self.fp8_calibration, self.fp8_meta = False, False, {"fp8_checkpoint": False}
        for number in range(num_gemms):
            self._add(f"weight{number}", out_features, in_features, dtype=params_dtype)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...


class DotProductAttention(_Layer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


class TransformerLayer(_Layer):
    """A class to inherit from."""


class CudaRNGStatesTracker:
    """A class to inherit from."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.states_: dict[str, Any] = {}


distributed = SimpleNamespace(CudaRNGStatesTracker=CudaRNGStatesTracker)
ops = SimpleNamespace(Sequential=torch.nn.Sequential, FusibleOperation=torch.nn.Module)
__all__ = ["fp8"]
