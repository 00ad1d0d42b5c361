"""Hashes of files that all ranks see, each file read by one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from compactlm_nemo.artifacts import file_problems
from compactlm_nemo.parallel.collectives import all_gather_objects


def shared_file_problems(folder: Path, recorded: Mapping[str, Any]) -> list[str]:
    """Return, on every rank, what is wrong with the files of a folder: see `artifacts.file_problems`. Collective."""
    mine = file_problems(folder, recorded, _share(sorted(recorded)))
    return [problem for problems in all_gather_objects(mine) for problem in problems]


def _share(names: list[str]) -> list[str]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return names[rank::world]
