"""A distributed checkpoint whose files threads write while training goes on.

Megatron-Core prepares the save and ends it, as it does for savers of its own. Those fork a process or start one beside
each rank, which holds a copy of everything, needs a process's imports, or hangs when a thread held a lock at the fork.
The files are written without Python's lock, so threads of the rank hold up its steps as little.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from compactlm_nemo.artifacts import describe_files
from compactlm_nemo.models.checkpoint import own_storages
from compactlm_nemo.parallel.background import Workers
from compactlm_nemo.parallel.collectives import all_gather_objects
from compactlm_nemo.parallel.world import is_main_rank

_PARAMETERS = inspect.signature(dist_checkpointing.save).parameters
_OWN_WRITER = {"async_strategy": "mcore"} if "async_strategy" in _PARAMETERS else {}
"""Newer versions write by processes of another package, if it is there, unless they are told."""

Described = dict[str, dict[str, Any]]
"""Size and SHA-256 of files, by name."""


class BackgroundSave:
    """A save that has begun: threads write and hash the files. Collective.

    Args:
        state: Megatron's sharded state.
        folder: Empty folder that all ranks see.
        may_change: Whether the state may change as soon as this object is made, for which what is on the host is
            copied; what is on a device always is.
    """

    def __init__(self, state: dict[str, Any], folder: Path, *, may_change: bool) -> None:
        self.begun = time.monotonic()
        """When the save began, by the monotonic clock."""
        own_storages(state, may_change=may_change)
        request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **_OWN_WRITER)
        assert request is not None
        self._folder, self._finalize = folder, request.finalize_fns
        self._threads = Workers(1)
        self._written = self._threads.submit(_write, request.async_fn, _arguments(request), folder)

    def is_written(self) -> bool:
        """Return whether this rank has written its files, or failed to."""
        return self._written.done()

    def close(self) -> None:
        """Return when no thread writes any more; the checkpoint stays unfinished."""
        self._threads.close()

    def finish(self) -> Described:
        """Wait for every rank and complete the checkpoint; return size and SHA-256 of all files on the main rank.

        Collective. What failed on one rank is raised on all.
        """
        failure = self._written.exception()
        self.close()
        if failures := [error for error in all_gather_objects(failure) if error is not None]:
            raise failures[0]
        for finalize in self._finalize:  # these raise on every rank what the writing of a file raised on one
            finalize()
        parts = all_gather_objects(self._written.result())
        described = {name: one for part in parts for name, one in part.items()}
        return described | (_described(self._folder, self._others(described)) if is_main_rank() else {})

    def _others(self, described: Described) -> list[Path]:
        """Return the files that no rank has hashed: the index and other small ones, which the main rank writes."""
        files = (path for path in self._folder.rglob("*") if path.is_file())
        return [path for path in files if str(path.relative_to(self._folder)) not in described]


def _arguments(request: Any) -> list[Any]:
    """Return the arguments of a save's writing function, all tensors on the host."""
    if request.async_fn is None:  # this rank has no files
        return []
    rank, _, results = request.async_fn_args
    return [rank, request.preload_fn(), results]


def _write(write: Callable[..., None] | None, arguments: list[Any], folder: Path) -> Described:
    """Write the files of this rank, and return what was written; nothing when that failed, which Megatron tells."""
    if write is None:
        return {}
    write(*arguments)
    paths = [Path(path) for path, _, _ in arguments[1]]
    return _described(folder, [path for path in paths if path.is_file()])


def _described(folder: Path, paths: list[Path]) -> Described:
    return {str(path.relative_to(folder)): described for path, described in describe_files(paths).items()}
