"""NeMo 2 at work, on the CPU: a process of its environment's Python that does a list of jobs.

python tool.py JOBS.json        `[["import", MODEL, SETTINGS, HF, NEMO], ...]`, functions of `COMMANDS`, arguments
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo.collections import llm  # type: ignore[import-not-found]
from nemo.lightning import io  # type: ignore[import-not-found]


def import_checkpoint(model: str, settings: str, hf: str, target: str) -> None:
    """Let NeMo make a checkpoint of a Hugging Face folder; its settings are those of that folder."""
    made = getattr(llm, model)(getattr(llm, settings)())
    llm.import_ckpt(model=made, source=f"hf://{hf}", output_path=Path(target), overwrite=True)


def export_checkpoint(source: str, target: str) -> None:
    llm.export_ckpt(path=Path(source), target="hf", output_path=Path(target), overwrite=True)


def load(source: str, file: str) -> None:
    """Load the context and build what it describes; keep the settings, and what the tokenizer makes of a text."""
    context = io.load_context(Path(source))
    model = context.model
    fields = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)}
    plain = {
        name: value for name, value in fields.items() if value is None or isinstance(value, (int, float, str, list))
    }
    told = {"model": type(model).__name__, "settings": type(model.config).__name__, "values": plain}
    Path(file).write_text(json.dumps(told | {"ids": model.tokenizer.text_to_ids("w1 w2 w1")}))


def defaults(names: str, file: str) -> None:
    """Keep the values that classes of settings have where nothing is given, as plain values."""
    found = {}
    for name in names.split(","):
        module, _, kind = name.rpartition(".")
        fields = dataclasses.fields(getattr(importlib.import_module(module), kind))
        values = {field.name: _default(field) for field in fields}
        found[kind] = {key: _plain(value) for key, value in values.items() if _is_plain(value)}
    Path(file).write_text(json.dumps(found))


def _is_plain(value: Any) -> bool:
    return value is None or callable(value) or isinstance(value, (int, float, str, list))


def _plain(value: Any) -> Any:
    return f"{value.__module__}.{value.__name__}" if callable(value) else value


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


COMMANDS: dict[str, Callable[..., None]] = {
    "import": import_checkpoint,
    "export": export_checkpoint,
    "load": load,
    "defaults": defaults,
}

if __name__ == "__main__":
    for command, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        COMMANDS[command](*arguments)
