"""The export stage: the distilled student becomes a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def export(run: Run, folder: Path) -> dict[str, Any]:
    """Write the distilled student as a Hugging Face folder, and count its parameters in the files."""
    from compactlm_nemo.errors import CheckpointError
    from compactlm_nemo.models.checkpoint import CheckpointSource
    from compactlm_nemo.models.hf import count_params, export_hf
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.search.cost import num_params
    from compactlm_nemo.stages.context import HF

    dims = run.dims("distill")
    target = folder / HF
    with main_rank_writes() as writes:
        if writes:
            source = CheckpointSource(run.path("distill"), dims)
            export_hf(run.path("teacher") / HF, target, dims, source, run.dtype)
    counted = count_params(target)
    if counted != num_params(dims):
        raise CheckpointError(f"{target} holds {counted} parameters, the plan says {num_params(dims)}.")
    return {"params": counted, "folder": str(target)}


STAGE = Stage(
    name="export",
    summary="distilled student -> `export/hf`, a Hugging Face folder",
    reads=("teacher", "distill"),
    writes="export",
    settings=lambda config: {},
    run=export,
)
