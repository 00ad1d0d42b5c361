"""Settings as values of Python become the overrides of a command line, so that both are read and checked on one way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from os import PathLike, fspath
from typing import Any

from compactlm_nemo.config.overrides import OPEN_KEY, quoted
from compactlm_nemo.errors import ConfigError

_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_]\w*", re.IGNORECASE | re.ASCII)
"""Words that Hydra's grammar reads as text without quotes; names of experiments must have none."""


def overrides_of(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return `KEY=VALUE` for every setting; sections may be dotted keys or mappings inside each other."""
    overrides: list[str] = []
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if not isinstance(name, str) or "=" in name:
            raise ConfigError(f"{key!r} is no setting; give dotted names, as in {{'distill.lr': 1e-4}}.")
        if isinstance(value, Mapping) and not OPEN_KEY.fullmatch(f"{key}="):
            overrides += overrides_of(value, f"{key}.")
        else:
            overrides.append(f"{key}={_spelled(value, key)}")
    return overrides


def _spelled(value: Any, key: str) -> str:
    """Return a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    if isinstance(value, (str, PathLike)):
        return _text(fspath(value))
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_spelled(item, key) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_spelled(inner, key)}" for name, inner in value.items()) + "}"
    raise ConfigError(f"{key}={value!r} is a {type(value).__name__}; give text, a number, a list or a mapping.")


def _text(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else quoted(text.replace("${", r"\${"))
