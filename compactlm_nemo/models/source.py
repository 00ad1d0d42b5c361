"""What `model.source` can be (Hugging Face folder, GGUF file, `torch_dist` folder): its architecture and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compactlm_nemo.config.model import ModelConfig
from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.models import gguf
from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.checkpoint import CheckpointSource, find_weights
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.models.hf import open_hf, read_config


def declared_dims(cfg: ModelConfig) -> Dims | None:
    """The architecture that the experiment states, None when it states none."""
    if not cfg.architecture:
        return None
    from transformers import AutoConfig

    values: dict[str, Any] = dict(cfg.architecture)
    kind = values.pop("model_type", None)
    if kind is None:
        raise ConfigError("model.architecture has no model_type; give for example model.architecture.model_type=llama.")
    try:
        return dims_of(AutoConfig.for_model(kind, **values))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.architecture is no config of transformers: {str(error).splitlines()[0]}") from None


def companions_folder(cfg: ModelConfig) -> Path:
    """The folder with `config.json` and tokenizer of a teacher that is a folder."""
    source = Path(cfg.source)
    if find_weights(source) is None:
        return source
    if cfg.companions is None:
        raise ConfigError(
            f"model.source={source} is a torch_dist folder without config.json and tokenizer; "
            "set model.companions to a folder that has them."
        )
    return Path(cfg.companions)


def teacher_dims(cfg: ModelConfig) -> Dims:
    """Architecture of an existing teacher; names and shapes of all its weights are checked, none is read."""
    source = Path(cfg.source)
    if source.is_file():
        if source.suffix != ".gguf":
            raise CheckpointError(f"model.source={source} is neither a folder nor a .gguf file; give one of them.")
        return dims_of(gguf.read(source)[1])
    return open_teacher(cfg)[0]


def open_teacher(cfg: ModelConfig) -> tuple[Dims, ParameterSource]:
    """Architecture and weights of a teacher that is a folder."""
    source = Path(cfg.source)
    if find_weights(source) is None:
        return open_hf(source)
    dims = dims_of(read_config(companions_folder(cfg)))
    return dims, CheckpointSource(source, dims)
