"""The export stage: a model of the run becomes a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.export import ExportDtype, ExportedModel
from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    import torch

    from compactlm_nemo.stages.context import Run

ARTIFACTS = {ExportedModel.teacher: "teacher", ExportedModel.student: "student", ExportedModel.distilled: "distill"}
"""Model that leaves -> the artifact that holds it."""


def export(run: Run, folder: Path) -> dict[str, Any]:
    """Write the chosen model as a Hugging Face folder, and count its parameters in the files."""
    from compactlm_nemo.errors import CheckpointError
    from compactlm_nemo.models.checkpoint import CheckpointSource
    from compactlm_nemo.models.hf import count_params, export_hf
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.search.cost import num_params
    from compactlm_nemo.stages.context import HF

    cfg = run.config.export
    artifact = ARTIFACTS[cfg.of]
    dims, target, hf_assets = run.dims(artifact), folder / HF, run.path("teacher") / HF
    dtype = _dtype(run, hf_assets)
    with main_rank_writes() as writes:
        if writes:
            source = CheckpointSource(run.path(artifact), dims)
            export_hf(hf_assets, target, dims, source, dtype, int(cfg.shard_gib * 2**30))
    counted = count_params(target)
    if counted != num_params(dims):
        raise CheckpointError(f"{target} holds {counted} parameters, the plan says {num_params(dims)}.")
    return {"params": counted, "folder": str(target), "dtype": str(dtype).removeprefix("torch.")}


def _dtype(run: Run, hf_assets: Path) -> torch.dtype:
    """Return the number format that is asked for, or else the teacher's own."""
    import torch

    from compactlm_nemo.models.hf_assets import dtype_of

    by_name = {ExportDtype.fp32: torch.float32, ExportDtype.bf16: torch.bfloat16, ExportDtype.fp16: torch.float16}
    if run.config.export.dtype is not None:
        return by_name[run.config.export.dtype]
    stated = {str(dtype).removeprefix("torch."): dtype for dtype in by_name.values()}
    return stated.get(dtype_of(hf_assets) or "", run.dtype)


def _reads(of: ExportedModel) -> dict[str, Any]:
    return {ARTIFACTS[of]: lambda config: config.export.of is of}


STAGE = Stage(
    name="export",
    summary="one model of the run (`export.of`) -> `export/hf`, a Hugging Face folder",
    reads=("teacher",),
    may_read=_reads(ExportedModel.student) | _reads(ExportedModel.distilled),
    writes="export",
    settings=lambda config: {"export": result_settings(config.export)},
    run=export,
)
