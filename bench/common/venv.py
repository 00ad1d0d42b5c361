"""Tools to measure against, each in a virtual environment of its own: baselines, never dependencies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Tool(NamedTuple):
    """A folder beside this file, and what is installed in it, step by step."""

    folder: str
    pins: tuple[tuple[str, ...], ...]


TORCH = ("torch==2.13.0",)
"""The torch build pip is set up for goes first, as in the Makefile."""


MODEL_OPTIMIZER = Tool(
    ".venv-modelopt",
    # 0.43.0 is the last release that imports without Transformer Engine; it forgets to ask for `requests`.
    (TORCH, ("nvidia-modelopt==0.43.0", "megatron-core==0.16.1", "omegaconf", "requests")),
)


LIGER = Tool(
    ".venv-liger",
    # Its chunked losses are plain torch; the Triton that it asks for is not used on a CPU.
    (TORCH, ("--no-deps", "liger-kernel==0.8.5"), ("numpy", "safetensors", "packaging")),
)


def interpreter(tool: Tool) -> Path:
    """The interpreter of the environment, which is built when it is missing or was left half-built."""
    folder = Path(__file__).parents[1] / tool.folder
    python, stamp, wanted = folder / "bin" / "python", folder / ".installed", repr(tool.pins)
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for packages in tool.pins:
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        stamp.write_text(wanted)
    return python
