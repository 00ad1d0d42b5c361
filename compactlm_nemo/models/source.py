"""What `model.source` can be (repository, Hugging Face folder, GGUF file, `torch_dist` folder): sizes and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.model import ModelConfig, is_repository
from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.models.bridge_config import (
    RUN_CONFIG,
    dims_of_settings,
    number_format,
    read_model_settings,
    refuse_other_settings,
)
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.models.hf_config import config_values, quick_dims, quick_folder_dims
from compactlm_nemo.models.nemo_config import CONTEXT, NEMO_TOKENIZER, dims_of_nemo, read_nemo_settings
from compactlm_nemo.models.outside import refuse_absurd_sizes

if TYPE_CHECKING:
    from compactlm_nemo.models.build import ParameterSource

WEIGHTS = "weights"
"""Subfolder of a model folder with the distributed checkpoint; `model.json` and `hf/` stand beside it."""


TRACKER = "latest_checkpointed_iteration.txt"
"""File beside the folders of a training's checkpoints: the number of the one to read, or `release`."""
TOKENIZER = "tokenizer"
"""Folder in a checkpoint of Bridge."""


def local_source(cfg: ModelConfig) -> Path:
    """Return where the teacher lies here; for a repository of the Hub that is its commit's folder in the cache."""
    if is_repository(cfg.source):
        from compactlm_nemo.models.hub import snapshot

        return snapshot(cfg)
    return Path(cfg.source)


def find_weights(folder: Path) -> Path | None:
    """Return the `torch_dist` folder in a model folder: ours and NeMo 2's `weights`, or a checkpoint of Bridge.

    That is the one that its tracker names; without a tracker the `iter_*` of the largest number, or `release`.

    Raises:
        CheckpointError: the tracker names none, or one that is not there.
    """
    for path in (folder / WEIGHTS, folder):
        if (path / ".metadata").is_file():
            return path
    if (folder / TRACKER).is_file():
        return _tracked(folder)
    numbered = [path for path in folder.glob("iter_*") if path.name[5:].isdecimal()]
    candidates = [*sorted(numbered, key=lambda path: int(path.name[5:]), reverse=True), folder / "release"]
    return next((path for path in candidates if (path / ".metadata").is_file()), None)


def _tracked(folder: Path) -> Path:
    """Return the checkpoint that the tracker of a folder names."""
    word = (folder / TRACKER).read_text(encoding="utf-8", errors="replace")[:100].strip()
    if word != "release" and not (word.isascii() and word.isdecimal()):
        raise CheckpointError(f"{folder / TRACKER} says {word!r}; it must be a number or `release`: mend it.")
    path = folder / ("release" if word == "release" else f"iter_{int(word):07d}")
    if not (path / ".metadata").is_file():
        raise CheckpointError(
            f"{folder / TRACKER} says {word}, and {path} holds no checkpoint; fetch it, or set model.source to another."
        )
    return path


@dataclass(frozen=True)
class OwnModel:
    """What a checkpoint itself says of its model: Megatron-Bridge and NeMo 2 keep that beside the weights."""

    dims: Dims
    number_format: str
    where: str
    """File that says it."""
    tokenizer: Path
    """Where the tokenizer is, if it travels with the checkpoint."""


def own_model(weights: Path, vocab_size: int | None = None) -> OwnModel | None:
    """Return what the checkpoint in a `torch_dist` folder says of its model; None where it says nothing.

    Args:
        vocab_size: Size of the vocabulary where NeMo leaves that to the tokenizer; None reads the tokenizer.
    """
    if (settings := read_model_settings(weights)) is not None:
        where = weights / RUN_CONFIG
        dims = dims_of_settings(settings, str(where))
        return OwnModel(dims, number_format(settings), str(where), weights / TOKENIZER)
    tokenizer = weights.parent / CONTEXT / NEMO_TOKENIZER
    if weights.name != WEIGHTS or (nemo := read_nemo_settings(weights.parent)) is None:
        return None
    dims = dims_of_nemo(nemo, tokenizer, vocab_size)
    return OwnModel(dims, number_format(nemo.values), nemo.where, tokenizer)


def quick_source_dims(cfg: ModelConfig) -> Dims | None:
    """Return the teacher's architecture without heavy imports; None where only a closer look can tell.

    Where the source is absent it is the one that `model.architecture` states.
    """
    source = local_source(cfg)
    if not source.exists():
        return quick_dims(dict(cfg.architecture)) if cfg.architecture else None
    if source.suffix == ".gguf":
        from compactlm_nemo.models import gguf

        return quick_dims(gguf.config_values(source))
    weights = find_weights(source)
    if weights is None:
        return quick_folder_dims(source)
    if cfg.hf_assets:
        return quick_folder_dims(Path(cfg.hf_assets))
    own = own_model(weights)
    return None if own is None else own.dims


def declared_dims(cfg: ModelConfig) -> Dims | None:
    """Return the architecture that the experiment states, None when it states none."""
    if not cfg.architecture:
        return None
    from transformers import AutoConfig

    values: dict[str, Any] = dict(cfg.architecture)
    kind = values.pop("model_type", None)
    if kind is None:
        raise ConfigError("model.architecture has no model_type; give for example model.architecture.model_type=llama.")
    refuse_absurd_sizes(values, "model.architecture")
    try:
        return dims_of(AutoConfig.for_model(kind, **values))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.architecture is no config of transformers: {str(error).splitlines()[0]}") from None


def hf_assets_folder(cfg: ModelConfig) -> Path:
    """Return the folder with the tokenizer of a teacher that is a folder, and its config.json if that has one."""
    source = local_source(cfg)
    weights = find_weights(source)
    if weights is None:
        return source
    if cfg.hf_assets is not None:
        return Path(cfg.hf_assets)
    if (own := own_model(weights)) is None:
        raise ConfigError(
            f"model.source={source} is a torch_dist folder without config.json and tokenizer; "
            "set model.hf_assets to a folder that has them."
        )
    if not own.tokenizer.is_dir():
        raise ConfigError(
            f"model.source={source} has no tokenizer in {own.tokenizer}; set model.hf_assets to a folder with "
            "config.json and tokenizer."
        )
    return own.tokenizer


def generated_config(cfg: ModelConfig, dims: Dims) -> dict[str, Any] | None:
    """Return a config.json for a teacher that has none of its own; None where `hf_assets_folder` holds it."""
    weights = find_weights(local_source(cfg))
    if cfg.hf_assets is not None or weights is None or (own := own_model(weights)) is None:
        return None
    return config_values(dims) | {"dtype": own.number_format}


def teacher_dims(cfg: ModelConfig) -> Dims:
    """Return the architecture of an existing teacher; all names and shapes of weights are checked, none is read.

    Of a repository of the Hub only config.json is here before the import stage, which checks the rest.
    """
    from compactlm_nemo.models.hf import read_config

    source = local_source(cfg)
    if source.is_file():
        if source.suffix != ".gguf":
            raise CheckpointError(f"model.source={source} is neither a folder nor a .gguf file; give one of them.")
        from compactlm_nemo.models import gguf

        return quick_dims(gguf.config_values(source)) or dims_of(gguf.read(source)[1])
    if is_repository(cfg.source):
        return dims_of(read_config(source))
    return open_teacher(cfg)[0]


def open_teacher(cfg: ModelConfig) -> tuple[Dims, ParameterSource]:
    """Return architecture and weights of a teacher that is a folder."""
    from compactlm_nemo.models.checkpoint import CheckpointSource
    from compactlm_nemo.models.hf import open_hf, read_config

    source = local_source(cfg)
    weights = find_weights(source)
    if weights is None:
        return open_hf(source)
    if cfg.hf_assets is None and (own := own_model(weights)) is not None:
        return own.dims, CheckpointSource(source, own.dims)
    dims = dims_of(read_config(hf_assets_folder(cfg)))
    if (own := own_model(weights, dims.vocab_size)) is not None:
        refuse_other_settings(dims, own.dims, Path(str(cfg.hf_assets)), own.where)
    return dims, CheckpointSource(source, dims)
