"""Rotary embeddings: what a config says of them, and the frequencies that follow from it.

Shape suffixes: D rotated channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.dims import Dims

if TYPE_CHECKING:
    from torch import Tensor

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_LONG = ("short_factor", "long_factor", "original_max_position_embeddings")
REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": _LLAMA3,
    "yarn": ("factor",),
    "longrope": _LONG,
}
"""Kind of scaling -> the numbers without which it means nothing."""


def rope_of(config: Any) -> dict[str, Any]:
    """Return `rope_theta`, `rotary_percent` and `rope_scaling` of `Dims` from a config's either spelling.

    Scaling is None for frequencies `theta^(-2i / D)` as they are: also for `dynamic`, which changes them only for
    sequences longer than `max_position_embeddings`, and those are refused.

    Raises:
        CheckpointError: a kind of scaling that is not known, or numbers that it cannot have.
    """
    given = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    theta = given.pop("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0
    percent = given.pop("partial_rotary_factor", None) or getattr(config, "partial_rotary_factor", None) or 1.0
    kinds = [given.pop(name, None) for name in ("rope_type", "type")]
    kind = kinds[0] or kinds[1] or "default"
    if kind not in REQUIRED:
        raise CheckpointError(f"config.json: rope_type={kind!r} is not supported; use one of {', '.join(REQUIRED)}.")
    original = "original_max_position_embeddings"
    if given.get(original) is None and (top := getattr(config, original, None)) is not None:
        given[original] = top  # Phi-3 has it beside the others
    if missing := [name for name in REQUIRED[kind] if given.get(name) is None]:
        raise CheckpointError(f"config.json: rope_type={kind} lacks {missing[0]}; add it, or fetch the file again.")
    numbers = {name: value for name, value in given.items() if name in _NUMBERS and value is not None}
    for name, value in numbers.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            _check_number(name, number, zero=name.startswith("mscale"))
    scaling = None
    if kind in _RESOLVED:
        scaling = {"rope_type": kind} | _RESOLVED[kind](numbers | {"truncate": given.get("truncate", True)}, config)
    return {"rope_theta": float(theta), "rotary_percent": float(percent), "rope_scaling": scaling}


def rope_of_kinds(config: Any) -> dict[str, Any]:
    """Return the same of a config whose local layers turn by a theta of their own, and `local_rope_theta`.

    Version 5 of transformers has a dict for each kind of layer, version 4 `rope_local_base_freq` beside `rope_theta`.
    """
    kinds = getattr(config, "rope_parameters", None) or {}
    of_local = kinds.get("sliding_attention") or {"rope_theta": getattr(config, "rope_local_base_freq", None) or 1e4}
    of_global = kinds.get("full_attention")
    if of_global is None:
        theta = getattr(config, "rope_theta", None) or 1e6
        of_global = {"rope_theta": theta} | (getattr(config, "rope_scaling", None) or {})
    if (kind := of_local.get("rope_type", "default")) != "default":
        raise CheckpointError(f"config.json: rope_type={kind!r} of sliding_attention is not supported.")
    sizes = SimpleNamespace(rope_parameters=of_global, max_position_embeddings=config.max_position_embeddings)
    return rope_of(sizes) | {"local_rope_theta": float(of_local["rope_theta"])}


_NUMBERS = {
    *_LLAMA3, *_LONG, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
}  # fmt: skip


def _check_number(name: str, value: Any, *, zero: bool) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and not zero):
        raise CheckpointError(f"config.json: {name}={value!r} of its rotary embedding must be a number > 0.")


def _linear(numbers: Mapping[str, Any], config: Any) -> dict[str, Any]:
    return {"factor": float(numbers["factor"])}


def _llama3(numbers: Mapping[str, Any], config: Any) -> dict[str, Any]:
    return {name: numbers[name] for name in _LLAMA3}


def _yarn(numbers: Mapping[str, Any], config: Any) -> dict[str, Any]:
    factor = numbers["factor"]
    attention = numbers.get("attention_factor")
    if attention is None:
        whole, all_dims = numbers.get("mscale"), numbers.get("mscale_all_dim")
        attention = _mscale(factor, whole) / _mscale(factor, all_dims) if whole and all_dims else _mscale(factor, 1.0)
    return {
        "factor": float(factor),
        "original_max_position_embeddings": numbers.get(
            "original_max_position_embeddings", config.max_position_embeddings
        ),
        "beta_fast": numbers.get("beta_fast", 32),
        "beta_slow": numbers.get("beta_slow", 1),
        "truncate": bool(numbers["truncate"]),
        "attention_factor": float(attention),
    }


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(numbers: Mapping[str, Any], config: Any) -> dict[str, Any]:
    original = numbers["original_max_position_embeddings"]
    factor = numbers.get("factor") or config.max_position_embeddings / original
    attention = numbers.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    lists = [numbers[name] for name in ("short_factor", "long_factor")]
    if not all(isinstance(values, (list, tuple)) for values in lists) or len(set(map(len, lists))) != 1:
        raise CheckpointError("config.json: short_factor and long_factor must be lists of one number a channel pair.")
    stretched = {name: [float(value) for value in numbers[name]] for name in ("short_factor", "long_factor")}
    return stretched | {"original_max_position_embeddings": original, "attention_factor": float(attention)}


_RESOLVED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def mscale_of(config: Any) -> float:
    """Return ``0.1 mscale_all_dim ln(factor) + 1`` of a config's scaling, 1 without: its square goes to the softmax."""
    given = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    all_dims = given.get("mscale_all_dim")
    return _mscale(given["factor"], all_dims) if all_dims and given.get("factor") else 1.0


def attention_factor(dims: Dims) -> float:
    """Return what cosines and sines are multiplied with."""
    return float((dims.rope_scaling or {}).get("attention_factor", 1.0))


def inverse_frequencies(dims: Dims, length: int = 0) -> Tensor:
    """Return rotary frequencies of a model for sequences of `length` tokens, `[D / 2]` float32.

    Without scaling they are `f_i = theta^(-2i / D)`, and with it:

    - linear: `f_i / factor`.
    - llama3: wavelengths longer than `original / low_freq_factor` are divided by `factor`, those shorter than
      `original / high_freq_factor` kept, those between blended linearly in `original / wavelength`.
    - yarn: channels that turn more than `beta_fast` times over `original` tokens are kept, those that turn less than
      `beta_slow` times divided by `factor`, those between blended linearly in i.
    - longrope: `f_i / short_factor_i`, or `long_factor_i` for sequences longer than `original`.

    Source: arXiv 2306.15595, Llama 3.1 reference code, arXiv 2309.00071, arXiv 2402.13753; as in transformers.
    """
    import torch

    rotary_dim = dims.rotary_dim
    freqs_D = 1.0 / dims.rope_theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    scaling = dims.rope_scaling
    if scaling is None:
        return freqs_D
    original = scaling.get("original_max_position_embeddings", 0)
    match scaling["rope_type"]:
        case "linear":
            return freqs_D / scaling["factor"]
        case "longrope":
            stretch = scaling["long_factor" if length > original else "short_factor"]
            return freqs_D / torch.tensor(stretch, dtype=torch.float32)
        case "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns_D = original * freqs_D / (2 * math.pi)
            kept_D = ((turns_D - low) / (high - low)).clamp(0, 1)
        case _:
            kept_D = 1 - _yarn_ramp(scaling, dims.rope_theta, rotary_dim)
    return freqs_D * (kept_D + (1 - kept_D) / scaling["factor"])


def _yarn_ramp(scaling: Mapping[str, Any], theta: float, rotary_dim: int) -> Tensor:
    """Return `[D / 2]`, 0 for channels that are kept and 1 for those that are stretched whole."""
    import torch

    original = scaling["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        """Return which channel turns so many times over the original length."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(scaling["beta_fast"]), channel(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first or 0.001
    return ((torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
