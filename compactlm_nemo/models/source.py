"""What `model.source` can be (Hugging Face folder, GGUF file, `torch_dist` folder): its architecture and weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.model import ModelConfig
from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.models.hf_config import quick_dims, quick_folder_dims
from compactlm_nemo.models.outside import refuse_absurd_sizes

if TYPE_CHECKING:
    from compactlm_nemo.models.build import ParameterSource

WEIGHTS = "weights"
"""Subfolder of a model folder with the distributed checkpoint; `model.json` and `hf/` stand beside it."""


def find_weights(folder: Path) -> Path | None:
    """Return the `torch_dist` folder in a model folder: ours and NeMo 2's `weights`, Bridge's newest `iter_*`."""
    candidates = [folder / WEIGHTS, folder, *sorted(folder.glob("iter_*"), reverse=True)]
    return next((path for path in candidates if (path / ".metadata").is_file()), None)


def quick_source_dims(cfg: ModelConfig) -> Dims | None:
    """Return the teacher's architecture without heavy imports; None where only a closer look can tell.

    Where the source is absent it is the one that `model.architecture` states.
    """
    source = Path(cfg.source)
    if not source.exists():
        return quick_dims(dict(cfg.architecture)) if cfg.architecture else None
    if source.suffix == ".gguf":
        from compactlm_nemo.models import gguf

        return quick_dims(gguf.config_values(source))
    return quick_folder_dims(Path(cfg.hf_assets) if cfg.hf_assets and find_weights(source) else source)


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
    """Return the folder with `config.json` and tokenizer of a teacher that is a folder."""
    source = Path(cfg.source)
    if find_weights(source) is None:
        return source
    if cfg.hf_assets is None:
        raise ConfigError(
            f"model.source={source} is a torch_dist folder without config.json and tokenizer; "
            "set model.hf_assets to a folder that has them."
        )
    return Path(cfg.hf_assets)


def teacher_dims(cfg: ModelConfig) -> Dims:
    """Return the architecture of an existing teacher; all names and shapes of weights are checked, none is read."""
    source = Path(cfg.source)
    if source.is_file():
        if source.suffix != ".gguf":
            raise CheckpointError(f"model.source={source} is neither a folder nor a .gguf file; give one of them.")
        from compactlm_nemo.models import gguf

        return dims_of(gguf.read(source)[1])
    return open_teacher(cfg)[0]


def open_teacher(cfg: ModelConfig) -> tuple[Dims, ParameterSource]:
    """Return architecture and weights of a teacher that is a folder."""
    from compactlm_nemo.models.checkpoint import CheckpointSource
    from compactlm_nemo.models.hf import open_hf, read_config

    source = Path(cfg.source)
    if find_weights(source) is None:
        return open_hf(source)
    dims = dims_of(read_config(hf_assets_folder(cfg)))
    return dims, CheckpointSource(source, dims)
