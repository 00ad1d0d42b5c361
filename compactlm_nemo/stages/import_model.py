"""The import_model stage: a teacher of any kind becomes a checkpoint on the run's mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.model import ModelConfig, is_repository
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.records import is_hub, missing_sources, sources_of
from compactlm_nemo.models.bridge_config import RUN_CONFIG
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf_assets import assets_of, write_config
from compactlm_nemo.models.nemo_config import CONTEXT, IO, YAML
from compactlm_nemo.models.source import find_weights, hf_assets_folder
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def source_files(config: Config) -> dict[str, Path]:
    """Return the files of the teacher: its weights, what travels with it from import to export, and vocab_texts."""
    source, texts = Path(config.model.source), _vocab_files(config)
    if is_repository(config.model.source):
        return texts  # its commit tells the rest: `import_settings`
    if not source.is_dir():
        return {"model.source": source} | texts
    weights, kinds = find_weights(source), ("*.safetensors", "*.distcp", ".metadata", RUN_CONFIG)
    files = {str(path.relative_to(source)): path for kind in kinds for path in (weights or source).rglob(kind)}
    files |= {f"{CONTEXT}/{name}": source / CONTEXT / name for name in (IO, YAML)}
    assets = assets_of(source if weights is None else hf_assets_folder(config.model))
    return files | {f"hf_assets/{name}": path for name, path in assets.items()} | texts


def _vocab_files(config: Config) -> dict[str, Path]:
    """Return what decides which tokens stay: texts, and the user's chat template."""
    if config.model.vocab_texts is None:
        return {}
    texts = [source for source in sources_of(config.model.vocab_texts.path) if not is_hub(source)]
    template = {} if (given := config.data.chat_template) is None else {"data.chat_template": Path(given)}
    return template | {f"model.vocab_texts:{source}": Path(source) for source in texts}


def import_settings(config: Config) -> dict[str, Any]:
    """Return what decides the teacher's weights beside its files; of a repository the commit."""
    settings: dict[str, Any] = {"model.precision": config.model.precision}
    if is_repository(config.model.source):
        settings |= {"model.source": config.model.source, "model.revision": config.model.revision}
    if (texts := config.model.vocab_texts) is not None:
        settings |= {"model.vocab_texts": [texts.path, texts.key], "data.document_end": config.data.document_end}
    return settings


def import_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return what is wrong with source and texts of the model; a dry run can do with `model.architecture`."""
    model, texts = config.model, config.model.vocab_texts
    if model.revision is not None and not is_repository(model.source):
        return [
            f"model.revision={model.revision} is of a repository of the Hub, which model.source={model.source} is not; "
            "leave it out."
        ]
    if config.dry_run and model.architecture:
        return []
    problems = []
    if not Path(model.source).exists() and not is_repository(model.source):
        problems += [
            f"model.source={model.source} does not exist; give a model folder, a .gguf file, or ORG/NAME of the Hub."
        ]
    problems += [
        f"model.vocab_texts={path} does not exist, or is no text; give what data.train can have."
        for path in ([] if texts is None else texts.paths if texts.is_tokenised else missing_sources(texts.path))
    ]
    return problems


def import_plan(config: Config) -> list[str]:
    """Return what a dry run cannot know of the vocabulary."""
    if config.model.vocab_texts is None:
        return []
    return ["  model.vocab_texts: which tokens stay is known when it has read the texts; until then sizes are of all"]


def fetched(cfg: ModelConfig) -> ModelConfig:
    """Return a teacher that lies here: the files of a repository come to the main rank, and to other nodes. Collective.

    Nodes that share the main rank's cache have them already.
    """
    import os

    from compactlm_nemo.models.hub import download, snapshot
    from compactlm_nemo.parallel.collectives import barrier, broadcast_object
    from compactlm_nemo.parallel.launch import main_rank_writes

    names: list[str] = []
    with main_rank_writes() as writes:
        if writes:
            names = download(cfg)
    lacks = any(not (snapshot(cfg) / name).is_file() for name in broadcast_object(names))
    if lacks and os.environ.get("LOCAL_RANK") == "0":
        download(cfg)
    barrier()
    return replace(cfg, source=str(snapshot(cfg)), revision=None)


def import_model(run: Run, folder: Path) -> dict[str, Any]:
    """Convert a teacher of any kind into a checkpoint, `model.json`, and `hf/` with config and tokenizer.

    With `model.vocab_texts` it has the vocabulary of these texts, and `vocabulary.json` and `untrimmed/` beside them.
    """
    import shutil

    from compactlm_nemo.artifacts import write_json
    from compactlm_nemo.models import gguf
    from compactlm_nemo.models.build import fill
    from compactlm_nemo.models.hf_assets import copy_hf_assets
    from compactlm_nemo.models.source import generated_config, open_teacher
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.report.model_card import TEACHER_WORDS, teacher_words
    from compactlm_nemo.search.cost import num_params
    from compactlm_nemo.stages.context import HF
    from compactlm_nemo.stages.trim_vocabulary import kept_rows, trim_vocabulary

    teacher, converted = run.config.model, folder / "converted"
    if Path(teacher.source).suffix == ".gguf":
        with main_rank_writes() as writes:
            if writes:
                gguf.convert(Path(teacher.source), converted)
        teacher = replace(teacher, source=str(converted))
    if is_repository(teacher.source):
        teacher = fetched(teacher)
    dims, weights = open_teacher(teacher)
    with main_rank_writes() as writes:
        if writes:
            copy_hf_assets(hf_assets_folder(teacher), folder / HF)
    vocabulary = trim_vocabulary(run, folder, folder / HF, dims.vocab_size)
    if vocabulary is not None:
        dims, weights = replace(dims, vocab_size=len(vocabulary.rows)), kept_rows(weights, vocabulary)
    with main_rank_writes() as writes:
        if writes:
            if (values := generated_config(teacher, dims)) is not None:
                write_config(folder / HF, values)
            write_json(folder / TEACHER_WORDS, teacher_words(hf_assets_folder(teacher)))
    model = run.build(dims)
    fill(model, weights, run.config.model.vocab_multiple)
    run.save(folder, model, if_not_finite="give model.source a copy that is not damaged")
    with main_rank_writes() as writes:
        if writes:
            shutil.rmtree(converted, ignore_errors=True)
    kept = {} if vocabulary is None else {"vocab_size": dims.vocab_size, "whole_vocab_size": vocabulary.whole_size}
    return {"params": num_params(dims)} | kept


STAGE = Stage(
    name="import_model",
    summary="teacher folder, repository of the Hub, GGUF file -> Megatron distributed checkpoint, `model.json`, config "
    "and tokenizer",
    reads=(),
    writes="teacher",
    settings=import_settings,
    files=source_files,
    problems=import_problems,
    plan=import_plan,
    run=import_model,
)
