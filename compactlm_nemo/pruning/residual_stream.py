"""The residual stream is narrowed from H to K channels by changing the parameters that read or write the stream.

Three ways: `Selection` keeps K channels as they are, `RefittedSelection` also refits the readers, and
`RotatedStream` turns the stream first. Readers are the linear maps behind a norm; each norm has the name of its second
moments (`importance.names`). Results are in the dtype of the arguments. Parameters are narrowed on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from compactlm_nemo.importance.names import FINAL_NORM, attention_norm_key, heads_key, mlp_key, mlp_norm_key
from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.pruning.least_squares import refit
from compactlm_nemo.pruning.rotation import Rotation, normed_moment, principal_rotation

TABLE_ROWS = 2048
"""Most rows of an embedding table that are in float64 at once."""
Moment = Callable[[str], Tensor]
"""Name of second moments -> the whole matrix."""


class HiddenCut(Protocol):
    """A cut of the residual stream narrows each kind of parameter."""

    def embed(self, table_VH: Tensor) -> Tensor:
        """Narrow the embedding table, `[V, K]`."""

    def write(self, weight: Tensor) -> Tensor:
        """Narrow a writer of the stream: `[H, E]` -> `[K, E]`, or a bias `[H]` -> `[K]`."""

    def stream_map(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return the map of the stream itself, `[N, H]` -> `[N, K]`, for streams on `device`: what `write` does."""

    def norm(self, name: str, weight_H: Tensor) -> Tensor:
        """Narrow the weight of a norm, `[K]`."""

    def norm_bias(self, bias_H: Tensor) -> Tensor:
        """Narrow the bias of a norm, `[K]`."""

    def post_norm(self, writer: str, weight_H: Tensor) -> Tensor:
        """Narrow the weight of the norm behind the teacher's parameter `writer`, `[K]`."""

    def read(self, name: str, weight_OH: Tensor) -> Tensor:
        """Narrow a linear map behind the norm `name`, `[O, K]`."""


class Selection:
    """Selection keeps channels and changes nothing else."""

    def __init__(self, channels: Tensor) -> None:
        self.channels = channels

    def embed(self, table_VH: Tensor) -> Tensor:
        return table_VH.index_select(1, self.channels)

    def write(self, weight: Tensor) -> Tensor:
        return weight.index_select(0, self.channels)

    def stream_map(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        channels = self.channels.to(device)
        return lambda stream_NH: stream_NH.T.index_select(0, channels).T

    def norm(self, name: str, weight_H: Tensor) -> Tensor:
        return weight_H.index_select(0, self.channels)

    def norm_bias(self, bias_H: Tensor) -> Tensor:
        return bias_H.index_select(0, self.channels)

    def post_norm(self, writer: str, weight_H: Tensor) -> Tensor:
        return weight_H.index_select(0, self.channels)

    def read(self, name: str, weight_OH: Tensor) -> Tensor:
        return weight_OH.index_select(1, self.channels)


class NormedStream:
    """Reads second moments of the stream behind its norms, one at a time, of the teacher that `source` gives.

    `one_plus` says that the weight of a norm is 1 + w.
    """

    def __init__(self, moment: Moment, tokens: int, source: ParameterSource, *, one_plus: bool = False) -> None:
        self.moment, self.tokens, self.source, self.one_plus = moment, tokens, source, one_plus

    def norm_weight(self, name: str) -> Tensor:
        """Read the weight of the norm that has these second moments."""
        weight_H = self.source(norm_weight_name(name))
        return weight_H.float() + 1 if self.one_plus else weight_H

    def normed(self, name: str) -> Tensor:
        """Read ``M = E[x^ x^^T]`` before the norm's weight, float64."""
        return normed_moment(self.moment(name), self.tokens, self.norm_weight(name))

    def written(self, writer: str) -> Tensor:
        """Compute ``diag(W C W^T)`` of a parameter that writes to the stream, `[H]` float64: the energies it writes.

        C are the second moments of its input; a bias is left out.
        """
        layer, weight_HE = int(writer.split(".")[2]), self.source(writer).double()
        key = heads_key(layer) if "linear_proj" in writer else mlp_key(layer)
        return ((weight_HE @ self.moment(key).double()) * weight_HE).sum(dim=1)


class RefittedSelection(Selection):
    """Selection where readers make up for the removed channels, and norms for the smaller root mean square.

    An RMSNorm over fewer channels divides by another number, so its weight is scaled by the root mean square of the
    kept channels of ``x / rms(x)`` over the calibration tokens; behind a writer by that of the kept channels that are
    written, as a share of that of all. A LayerNorm's output is left to the readers' refit.
    """

    def __init__(self, channels: Tensor, stream: NormedStream, ridge: float, *, is_rms: bool) -> None:
        super().__init__(channels)
        self.stream, self.ridge, self.is_rms = stream, ridge, is_rms

    def norm(self, name: str, weight_H: Tensor) -> Tensor:
        weight_K = super().norm(name, weight_H)
        if not self.is_rms:
            return weight_K
        factor = self.stream.normed(name).diagonal()[self.channels].mean().sqrt().item()
        return scaled(weight_K, factor, one_plus=self.stream.one_plus)

    def post_norm(self, writer: str, weight_H: Tensor) -> Tensor:
        energy_H = self.stream.written(writer)
        share = energy_H[self.channels].mean() / energy_H.mean()
        return scaled(super().post_norm(writer, weight_H), share.sqrt().item(), one_plus=self.stream.one_plus)

    def read(self, name: str, weight_OH: Tensor) -> Tensor:
        return refit(weight_OH, self.stream.moment(name), self.channels, self.ridge).to(weight_OH.dtype)


class RotatedStream:
    """The stream is turned to its principal directions: `pruning.rotation` has the formulas."""

    def __init__(self, rotation: Rotation, stream: NormedStream, ridge: float) -> None:
        self.rotation, self.stream, self.ridge = rotation, stream, ridge
        self._map: tuple[str, Tensor] | None = None

    def embed(self, table_VH: Tensor) -> Tensor:
        scale_H, basis_HK = self.rotation.scale_H, self.rotation.basis_HK
        parts = [(rows.double() * scale_H @ basis_HK).to(rows.dtype) for rows in table_VH.split(TABLE_ROWS)]
        return torch.cat(parts)

    def write(self, weight: Tensor) -> Tensor:
        return _turned(weight, self.rotation.scale_H, self.rotation.basis_HK)

    def stream_map(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        scale_H, basis_HK = self.rotation.scale_H.to(device), self.rotation.basis_HK.to(device)
        return lambda stream_NH: _turned(stream_NH.T, scale_H, basis_HK).T

    def norm(self, name: str, weight_H: Tensor) -> Tensor:
        ones_K = torch.ones(self.rotation.basis_HK.shape[1], dtype=weight_H.dtype)
        if name != FINAL_NORM or not self.rotation.is_tied:
            return ones_K
        return (self.rotation.sign_K / self.rotation.gain(self.stream.normed(name))).to(weight_H.dtype)

    def norm_bias(self, bias_H: Tensor) -> Tensor:
        raise NotImplementedError("only RMSNorms, which have no bias, can be turned")

    def post_norm(self, writer: str, weight_H: Tensor) -> Tensor:
        raise NotImplementedError("a norm behind a writer sees a rotation")

    def read(self, name: str, weight_OH: Tensor) -> Tensor:
        if self._map is None or self._map[0] != name:  # one layer's readers come one after another
            norm_H = self.stream.norm_weight(name)
            self._map = (name, self.rotation.read(self.stream.normed(name), norm_H, self.ridge))
        parts = [(rows.double() @ self._map[1]).to(rows.dtype) for rows in weight_OH.split(TABLE_ROWS)]
        return torch.cat(parts)


def scaled(weight: Tensor, factor: float, *, one_plus: bool = False) -> Tensor:
    """Return a weight that is multiplied with a factor, where it is w or, for a norm, 1 + w."""
    if factor == 1:
        return weight
    return ((weight.double() + float(one_plus)) * factor - float(one_plus)).to(weight.dtype)


def _turned(writer: Tensor, scale_H: Tensor, basis_HK: Tensor) -> Tensor:
    """Return ``Q^T S W`` of a writer `[H, E]` or a bias `[H]`, in its dtype."""
    scale = scale_H.view(-1, *[1] * (writer.dim() - 1))
    return (basis_HK.T @ (writer.double() * scale)).to(writer.dtype)


FINAL_NORM_WEIGHT = "decoder.final_layernorm.weight"


def norm_weight_name(moment: str) -> str:
    """Return the parameter of the norm that has these second moments."""
    if moment == FINAL_NORM:
        return FINAL_NORM_WEIGHT
    _, layer, kind = moment.split(".")
    return f"decoder.layers.{layer}.{'input' if kind == 'attention_norm' else 'pre_mlp'}_layernorm.weight"


def stream_energy(teacher: Dims, layers: list[int], stream: NormedStream) -> Tensor:
    """Sum ``E[x^ x^^T]`` over the norms of these layers and the final one, `[H, H]` float64.

    Where layers read the stream without a norm, x^ is the stream divided by its root mean square over all tokens.
    """
    total_HH = torch.zeros(teacher.hidden_size, teacher.hidden_size, dtype=torch.float64)
    for name in [key(layer) for layer in layers for key in (attention_norm_key, mlp_norm_key)] + [FINAL_NORM]:
        if teacher.norm_before or name == FINAL_NORM:
            total_HH += stream.normed(name)
        else:
            moment_HH = stream.moment(name).double()
            total_HH += moment_HH / moment_HH.diagonal().mean()
    return total_HH


def stream_rotation(teacher: Dims, layers: list[int], num: int, stream: NormedStream) -> Rotation:
    """Find the `num` directions that hold most of what the norms of these layers see."""
    final_norm_H = stream.norm_weight(FINAL_NORM) if teacher.tied_embeddings else None
    return principal_rotation(stream_energy(teacher, layers, stream), final_norm_H, num)
