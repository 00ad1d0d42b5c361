"""NVIDIA Model-Optimizer in a virtual environment of its own: a baseline to measure against, never a dependency."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / ".venv-modelopt"
PYTHON = FOLDER / "bin" / "python"
PINS = (
    # The torch build pip is set up for goes first, as in the Makefile.
    ("torch==2.13.0",),
    # 0.43.0 is the last release that imports without Transformer Engine; it forgets to ask for `requests`.
    ("nvidia-modelopt==0.43.0", "megatron-core==0.16.1", "omegaconf", "requests"),
)


def model_optimizer_python() -> Path:
    """The interpreter of the environment, which is built when it is missing or was left half-built."""
    stamp = FOLDER / ".installed"
    wanted = repr(PINS)
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True)
        for packages in PINS:
            subprocess.run([str(PYTHON), "-m", "pip", "install", "-q", *packages], check=True)
        stamp.write_text(wanted)
    return PYTHON
