"""The import_model stage: a teacher of any kind becomes a checkpoint on the run's mesh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.bridge_config import RUN_CONFIG
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf_assets import assets_of, write_config
from compactlm_nemo.models.nemo_config import CONTEXT, IO, YAML
from compactlm_nemo.models.source import find_weights, hf_assets_folder
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def source_files(config: Config) -> dict[str, Path]:
    """Return the files of the teacher: its weights, and what travels with it from import to export."""
    source = Path(config.model.source)
    if not source.is_dir():
        return {"model.source": source}
    weights, kinds = find_weights(source), ("*.safetensors", "*.distcp", ".metadata", RUN_CONFIG)
    files = {str(path.relative_to(source)): path for kind in kinds for path in (weights or source).rglob(kind)}
    files |= {f"{CONTEXT}/{name}": source / CONTEXT / name for name in (IO, YAML)}
    assets = assets_of(source if weights is None else hf_assets_folder(config.model))
    return files | {f"hf_assets/{name}": path for name, path in assets.items()}


def import_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return what is wrong with `model.source`; a dry run can do with `model.architecture`."""
    if Path(config.model.source).exists() or (config.dry_run and config.model.architecture):
        return []
    return [f"model.source={config.model.source} does not exist; give a model folder or a .gguf file."]


def import_model(run: Run, folder: Path) -> dict[str, Any]:
    """Convert a teacher of any kind into a checkpoint, `model.json`, and `hf/` with config and tokenizer."""
    import shutil
    from dataclasses import replace

    from compactlm_nemo.artifacts import write_json
    from compactlm_nemo.models import gguf
    from compactlm_nemo.models.build import fill
    from compactlm_nemo.models.hf_assets import copy_hf_assets
    from compactlm_nemo.models.source import generated_config, open_teacher
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.report.model_card import TEACHER_WORDS, teacher_words
    from compactlm_nemo.search.cost import num_params
    from compactlm_nemo.stages.context import HF

    teacher, converted = run.config.model, folder / "converted"
    if Path(teacher.source).suffix == ".gguf":
        with main_rank_writes() as writes:
            if writes:
                gguf.convert(Path(teacher.source), converted)
        teacher = replace(teacher, source=str(converted))
    dims, weights = open_teacher(teacher)
    with main_rank_writes() as writes:
        if writes:
            copy_hf_assets(hf_assets_folder(teacher), folder / HF)
            if (values := generated_config(teacher, dims)) is not None:
                write_config(folder / HF, values)
            write_json(folder / TEACHER_WORDS, teacher_words(hf_assets_folder(teacher)))
    model = run.build(dims)
    fill(model, weights, run.config.model.vocab_multiple)
    run.save(folder, model, if_not_finite="give model.source a copy that is not damaged")
    with main_rank_writes() as writes:
        if writes:
            shutil.rmtree(converted, ignore_errors=True)
    return {"params": num_params(dims)}


STAGE = Stage(
    name="import_model",
    summary="teacher folder or GGUF file -> Megatron distributed checkpoint, `model.json`, config and tokenizer",
    reads=(),
    writes="teacher",
    settings=lambda config: {"model.precision": config.model.precision},
    files=source_files,
    problems=import_problems,
    memory=lambda config: ("teacher",),
    run=import_model,
)
