"""This process among those of its launch, read from the environment: nothing heavy is imported for it."""

from __future__ import annotations

import os


def launch_world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch_rank() -> int:
    """Return the global rank of this process, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def is_main_rank() -> bool:
    """Whether this process is the one that writes plain files and prints."""
    return launch_rank() == 0
