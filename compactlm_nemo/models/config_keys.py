"""Keys of a config.json that are notes of the tools which wrote it, and have no effect on the model."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from compactlm_nemo.errors import CheckpointError

MOST = 64
"""Unknown keys of a file that is read at all."""

_log = logging.getLogger(__name__)


def refuse_unknown_keys(keys: Mapping[str, Any], kind: str) -> None:
    """Let keys pass that no model of transformers reads (`unsloth_version`), once with a line, and refuse the others.

    Raises:
        CheckpointError: some model's code reads a key (`logit_scale`), so it may have an effect that would be missing.
    """
    if not keys:
        return
    if len(keys) > MOST:
        raise CheckpointError(f"config.json: {len(keys)} keys are not known for model_type={kind}; give a real config.")
    if "auto_map" in keys:
        raise CheckpointError(
            f"config.json: auto_map names code of the folder's own, which is never run; delete it if this is a {kind}."
        )
    names = tuple(sorted(keys))
    for key in names:
        if key in _read_by_models(names):
            raise CheckpointError(f"config.json: {key}={keys[key]!r} is not supported for model_type={kind}.")
    _tell(names)


@cache
def _read_by_models(keys: tuple[str, ...]) -> frozenset[str]:
    """Return which of the keys the installed transformers reads from a config, in any of its models."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    patterns = {key: re.compile(rf"config\.{re.escape(key)}\b|[\"']{re.escape(key)}[\"']") for key in keys}
    read: set[str] = set()
    for path in [*root.glob("models/*/modeling_*.py"), root / "modeling_utils.py", root / "modeling_rope_utils.py"]:
        text = path.read_text(encoding="utf-8")
        read |= {key for key, pattern in patterns.items() if key not in read and key in text and pattern.search(text)}
    return frozenset(read)


@cache
def _tell(keys: tuple[str, ...]) -> None:
    _log.warning("config.json: no model reads %s; notes of other tools have no effect.", ", ".join(keys))
