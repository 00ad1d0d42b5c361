"""The export stage: the distilled student becomes a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.hf import count_params, export_hf
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.search.cost import num_params
from compactlm_nemo.stages.context import HF, Run


def export(run: Run, folder: Path) -> dict[str, Any]:
    """Distilled student -> Hugging Face folder `export/hf`; its parameters, counted in the files, equal the plan."""
    dims = run.dims("distill")
    target = folder / HF
    with main_rank_writes() as writes:
        if writes:
            source = CheckpointSource(run.dir / "distill", dims)
            export_hf(run.dir / "teacher" / HF, target, dims, source, run.dtype)
    counted = count_params(target)
    if counted != num_params(dims):
        raise CheckpointError(f"{target} holds {counted} parameters, the plan says {num_params(dims)}.")
    return {"params": counted, "folder": str(target)}
