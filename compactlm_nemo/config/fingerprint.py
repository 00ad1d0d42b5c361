"""What decides a result: a mark at every setting, and the settings that the marks pick out.

A finished stage is skipped when what decided its result is unchanged, and refused when it differs. So each setting says
at its field whether another value gives another result:

    micro_batch: int = setting(1, changes_result=False)
    eval_every: int | None = setting(None, changes_result=lambda cfg: cfg.result is Result.best)

A stage names the sections that it reads (`Stage.settings`); the marks say which of their fields count.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from compactlm_nemo.config.schema import Config

T = TypeVar("T")
ChangesResult = bool | Callable[[Any], bool]
"""Whether a setting decides a result; where that depends on other settings, a function of its section."""

MARK = "changes_result"


def setting(default: T, *, changes_result: ChangesResult = True) -> T:
    """Return a dataclass field with a default and a mark; mutable defaults are copied for every instance."""
    metadata = {MARK: changes_result}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        field: Any = dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    else:
        field = dataclasses.field(default=default, metadata=metadata)
    return field


def result_settings(section: Any) -> dict[str, Any]:
    """Return the settings of a section that decide results, by name; sections inside it as dicts of their own."""
    decided: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        mark, value = field.metadata[MARK], getattr(section, field.name)
        if mark(section) if callable(mark) else mark:
            decided[field.name] = result_settings(value) if dataclasses.is_dataclass(value) else value
    return decided


def correction_settings(config: Config) -> dict[str, Any]:
    """Return what decides how the teacher is trained while it teaches; nothing where it is not."""
    return {"correct": result_settings(config.correction)} if config.correct.while_distilling else {}


def training_text(config: Config) -> dict[str, Any]:
    """Return what decides which tokens a sample of the training blend holds, and what they see of each other."""
    return _text(config, {name: corpus.share for name, corpus in config.data.blend.items()})


def calibration_text(config: Config) -> dict[str, Any]:
    """Return the same of the calibration samples, which may be of another blend."""
    return _text(config, config.calibration_shares)


def _text(config: Config, shares: dict[str, float]) -> dict[str, Any]:
    total = sum(shares.values())
    corpora = {name: config.data.train[name] for name in shares}
    return {
        "data.sequence_length": config.data.sequence_length,
        "data.mask_documents": config.data.mask_documents,
        "data.document_end": config.data.document_end if config.data.mask_documents else None,
        "data.bos": config.data.bos,
        "data.train": {
            name: [corpus.source, shares[name] / total, *([corpus.loss.name] if corpus.loss else [])]
            for name, corpus in corpora.items()
        },
        "run.seed": config.run.seed,
    }


def heldout_loss(config: Config) -> dict[str, Any]:
    """Return which tokens of held-out chats count, where that is set."""
    return {f"data.heldout.{name}.loss": c.loss.name for name, c in config.data.heldout.items() if c.loss}
