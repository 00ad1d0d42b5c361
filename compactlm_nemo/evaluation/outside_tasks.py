"""Task files of a user's folder are data: they may describe a task, and run nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compactlm_nemo.errors import DataError

_LARGEST = 4 * 2**20


def refuse_code(folder: Path) -> None:
    """Raise DataError where a task file of the folder names code, which lm-eval would import and call.

    That is every tag of YAML, as `!function utils.process`, and `trust_remote_code`; and a file that includes one from
    outside of the folder, of which nobody knows.
    """
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path} has more than {_LARGEST} bytes; evaluate.task_folder takes task files alone.")
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
        except yaml.YAMLError as error:
            reason = " ".join(str(getattr(error, "problem", None) or error).split())
            raise DataError(
                f"{path} cannot be used as data ({reason}); evaluate.task_folder takes plain YAML, without `!function`."
            ) from None
        if _has_key(content, "trust_remote_code"):
            raise DataError(f"{path} asks for trust_remote_code; no code of a data set is run, remove the line.")
        for included in _included(content):
            if folder.resolve() not in (path.parent / included).resolve().parents:
                raise DataError(f"{path} includes {included}, outside of evaluate.task_folder={folder}; copy it there.")


class _Plain(yaml.SafeLoader):
    """YAML without tags of one's own."""


def _included(content: Any) -> list[str]:
    value = content.get("include", []) if isinstance(content, dict) else []
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_has_key(inner, key) for inner in value.values())
    return isinstance(value, list) and any(_has_key(inner, key) for inner in value)
