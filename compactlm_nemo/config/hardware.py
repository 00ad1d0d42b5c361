"""Tells whether runs on this machine use CUDA and compile, without importing torch, which takes seconds."""

from __future__ import annotations

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

DRIVER = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Files that NVIDIA's driver makes on Linux, and Windows' for its Linux guests."""


def has_cuda() -> bool:
    """Return whether this machine's torch is made for CUDA and a driver shows this process a device.

    `CUDA_VISIBLE_DEVICES` hides devices: CUDA reads its list up to the first name that is none, as -1 or NoDevFiles.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    is_visible = first.isdigit() or first.startswith(("GPU-", "MIG-"))
    return is_visible and any(path.exists() for path in DRIVER) and torch_has_cuda()


def torch_has_cuda() -> bool:
    """Return whether the installed torch is made for CUDA, from the file in which it says so."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    version = Path(torch.origin).with_name("version.py")
    return version.is_file() and bool(re.search(r"^cuda\b[^=]*=\s*['\"]", version.read_text(), re.MULTILINE))


def can_compile() -> bool:
    """Return whether torch finds a C compiler, without which it compiles no kernel, and is not told to do without."""
    is_off = "1" in (os.environ.get("TORCH_COMPILE_DISABLE"), os.environ.get("TORCHDYNAMO_DISABLE"))
    return not is_off and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
