"""The generate stage: the teacher writes documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.config.generate import GenerateConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.limits import longest_text
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run

FILE = "documents.jsonl"


def generate_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return what stands against text of the teacher, and settings of it that nothing reads."""
    cfg, problems = config.generate, []
    if not config.data.has_generated:
        changed = [name for name, value in vars(cfg).items() if value != getattr(GenerateConfig, name)]
        return [
            f"generate.{name}={getattr(cfg, name)} has no effect while no text of data.train is generated; set "
            "data.train.NAME.generated=true, or leave it out."
            for name in changed
        ]
    if config.model.vocab_texts is not None:
        problems.append(
            "data.train has a generated text, whose tokens model.vocab_texts may not have kept; leave one of them out."
        )
    if models and cfg.max_tokens > (longest := longest_text(models[0])):
        problems.append(
            f"generate.max_tokens={cfg.max_tokens} must be <= {longest}, up to which the teacher's positions turn "
            "alike; lower it."
        )
    return problems


def generate_settings(config: Config) -> dict[str, Any]:
    """Return what decides the documents beside the teacher."""
    seed = config.run.seed if config.generate.seed is None else config.generate.seed
    of_data = {"data.bos": config.data.bos, "data.document_end": config.data.document_end}
    return {"generate": result_settings(config.generate) | {"seed": seed}} | of_data


def generate(run: Run, folder: Path) -> dict[str, Any]:
    """Let the teacher write documents from the beginning of a text on, into `documents.jsonl`."""
    if not run.config.data.has_generated:
        raise ConfigError("no text of data.train is generated; set data.train.NAME.generated=true.")
    from compactlm_nemo.stages.generate_pass import write_documents

    return write_documents(run, folder / FILE)


STAGE = Stage(
    name="generate",
    summary="teacher -> `documents.jsonl`, texts that it writes itself",
    reads=("teacher",),
    writes="generated",
    settings=generate_settings,
    is_wanted=lambda config: config.data.has_generated,
    problems=generate_problems,
    run=generate,
)
