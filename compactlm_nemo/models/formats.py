"""The formats in which a model leaves: what each can hold, who writes it, and who counts what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from compactlm_nemo.config.export import ExportFormat
from compactlm_nemo.models.bridge import bridge_problem, count_bridge, export_bridge
from compactlm_nemo.models.dims import Dims

if TYPE_CHECKING:
    import torch

    from compactlm_nemo.models.build import ParameterSource


class Format(NamedTuple):
    """One format; what it needs is imported when it is used."""

    problem: Callable[[Dims], str | None]
    """Returns why it cannot hold a model of an architecture."""
    write: Callable[[Path, Path, Dims, ParameterSource, torch.dtype, int], int]
    """Writes a model: the teacher's small files, target, architecture, weights, number format, bytes of a file."""
    count: Callable[[Path], int]
    """Returns the number of parameters in the files of a folder."""


def _write_hf(
    hf_assets: Path, folder: Path, dims: Dims, source: ParameterSource, dtype: torch.dtype, shard_bytes: int
) -> int:
    from compactlm_nemo.models.hf import export_hf

    return export_hf(hf_assets, folder, dims, source, dtype, shard_bytes)


def _count_hf(folder: Path) -> int:
    from compactlm_nemo.models.hf import count_params

    return count_params(folder)


FORMATS = {
    ExportFormat.hf: Format(lambda dims: None, _write_hf, _count_hf),
    ExportFormat.bridge: Format(bridge_problem, export_bridge, count_bridge),
}
