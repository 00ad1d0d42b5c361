"""The formats in which a model leaves: what each can hold, who writes it, and who counts what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from compactlm_nemo.config.export import ExportFormat
from compactlm_nemo.models.bridge import bridge_problem, count_bridge, engine_tensors, export_bridge
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER
from compactlm_nemo.models.nemo import export_nemo, nemo_problem, nemo_tensors, untied_for_nemo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compactlm_nemo.models.build import ParameterSource


class Format(NamedTuple):
    """One format; what it needs is imported when it is used."""

    problem: Callable[[Dims], str | None]
    """Returns why it cannot hold a model of an architecture."""
    write: Callable[[Path, Path, Dims, ParameterSource, torch.dtype, int], int]
    """Writes a model: the teacher's small files, target, architecture, weights, number format, bytes of a file."""
    count: Callable[[Path], int]
    """Returns the number of parameters in the files of a folder."""
    tensors: Callable[[Dims, ParameterSource, torch.dtype], Iterator[tuple[str, Tensor]]]
    """Yields the weights under the names that the tool which reads the format has for them."""
    tied: tuple[str, str]
    """The tool's names of embedding and output layer."""
    held: Callable[[Dims], Dims] = lambda dims: dims
    """Returns the architecture as which it holds a model that computes the same."""


def _write_hf(
    hf_assets: Path, folder: Path, dims: Dims, source: ParameterSource, dtype: torch.dtype, shard_bytes: int
) -> int:
    from compactlm_nemo.models.hf import export_hf

    return export_hf(hf_assets, folder, dims, source, dtype, shard_bytes)


def _count_hf(folder: Path) -> int:
    from compactlm_nemo.models.hf import count_params

    return count_params(folder)


def _hf_tensors(dims: Dims, source: ParameterSource, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    from compactlm_nemo.models.hf import hf_tensors

    return hf_tensors(dims, source, dtype)


_HF = ("model.embed_tokens.weight", "lm_head.weight")
_MEGATRON = (EMBEDDING, OUTPUT_LAYER)

FORMATS = {
    ExportFormat.hf: Format(lambda dims: None, _write_hf, _count_hf, _hf_tensors, _HF),
    ExportFormat.bridge: Format(bridge_problem, export_bridge, count_bridge, engine_tensors, _MEGATRON),
    ExportFormat.nemo2: Format(nemo_problem, export_nemo, count_bridge, nemo_tensors, _MEGATRON, untied_for_nemo),
}
