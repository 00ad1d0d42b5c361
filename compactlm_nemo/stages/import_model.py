"""The import_model stage: a teacher of any kind becomes a checkpoint on the run's mesh."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from compactlm_nemo.config.schema import Config
from compactlm_nemo.models import gguf
from compactlm_nemo.models.build import fill
from compactlm_nemo.models.hf import COMPANIONS, copy_companions
from compactlm_nemo.models.source import companions_folder, open_teacher
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.search.cost import num_params
from compactlm_nemo.stages.context import HF, Run


def _source(config: Config) -> dict[str, Path]:
    source = Path(config.model.source)
    if not source.is_dir():
        return {"model.source": source}
    kinds = ("*.safetensors", "*.distcp", ".metadata")
    files = {str(path.relative_to(source)): path for kind in kinds for path in source.rglob(kind)}
    described = Path(config.model.companions or source)
    return files | {f"companions/{name}": described / name for name in COMPANIONS}


def import_model(run: Run, folder: Path) -> dict[str, Any]:
    """Teacher of any kind -> checkpoint, `model.json`, and `hf/` with config and tokenizer."""
    teacher, converted = run.config.model, folder / "converted"
    if Path(teacher.source).suffix == ".gguf":
        with main_rank_writes() as writes:
            if writes:
                gguf.convert(Path(teacher.source), converted)
        teacher = replace(teacher, source=str(converted))
    dims, weights = open_teacher(teacher)
    with main_rank_writes() as writes:
        if writes:
            copy_companions(companions_folder(teacher), folder / HF)
    model = run.build(dims)
    fill(model, dims, run.mesh, weights, run.config.model.vocab_multiple)
    run.save(folder, model, dims)
    with main_rank_writes() as writes:
        if writes:
            shutil.rmtree(converted, ignore_errors=True)
    return {"params": num_params(dims)}
