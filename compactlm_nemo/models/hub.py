"""A repository of the Hugging Face Hub as a teacher: which commit it is, where its files lie here, and their download.

Files lie in the cache of `huggingface_hub` (`HF_HOME`), a folder for each commit. Nothing but safetensors and the small
files that travel with a model is fetched: no pickles, no code. `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` mean what
they mean to `huggingface_hub`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import write_json
from compactlm_nemo.config.model import ModelConfig, is_repository
from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.models.hf_assets import CARD, INDEX, travels
from compactlm_nemo.parallel.world import is_main_rank

CONFIG = "config.json"
COMMITS = "hub.json"
"""File of `run.dir`: the commit that the run's teacher is, whatever its branch becomes later."""
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN_RANK_SECONDS = 600.0
"""How long other ranks wait for the commit that the main rank finds."""
SECONDS = 10.0
"""How long the Hub may take to name a commit."""
_log = logging.getLogger(__name__)
_BUSY = (408, 425, 429, *range(500, 600))


@contextmanager
def way_to_hub(what: str) -> Iterator[None]:
    """Turn a Hub that is not reached, or is busy, into an OSError that `config.failures` takes for one that may pass.

    Args:
        what: Begins the line, before the reason.
    """
    try:
        yield
    except Exception as error:
        number = _passing(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), what) from error


def _passing(error: BaseException) -> int | None:
    """Return the number of the error of the system that an answer of the Hub amounts to, None where it is final."""
    cause: BaseException | None = error
    while cause is not None:
        if status := status_of(cause):
            return errno.EAGAIN if status in _BUSY else None
        if {"TransportError", "RequestException"} & {kind.__name__ for kind in type(cause).__mro__}:  # httpx, requests
            return errno.ENETUNREACH
        cause = cause.__cause__
    return None


def status_of(error: BaseException) -> int:
    """Return the HTTP status that an error came with, 0 where it has none."""
    return int(getattr(getattr(error, "response", None), "status_code", None) or 0)


def snapshot(cfg: ModelConfig) -> Path:
    """Return the folder of a commit in the cache, which need not be there yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, "models--" + cfg.source.replace("/", "--"), "snapshots", str(cfg.revision))


def pinned(cfg: ModelConfig, run_dir: Path, *, dry_run: bool = False) -> ModelConfig:
    """Return the settings with the commit of the teacher's repository as revision, its config.json in the cache.

    It is the commit that the run began with (`COMMITS`), else the one that the Hub names. Of several ranks the main one
    asks, and the others wait for `keep_commit`; in a plan they do without. A folder stays as it is.

    Args:
        dry_run: A plan with `model.architecture` can do without an answer, which is said.
    Raises:
        ConfigError: there is no such repository, revision or config.json, or none that this user may read.
        OSError: the Hub cannot be reached.
    """
    if not is_repository(cfg.source):
        return cfg
    asked = {"source": cfg.source, "revision": cfg.revision}
    commit = cfg.revision if COMMIT.fullmatch(cfg.revision or "") else _kept_commit(run_dir, asked)
    if commit is None and not is_main_rank():
        if dry_run:
            return cfg
        commit = _commit_of_main_rank(run_dir, asked)
    try:
        commit = commit or _commit_of_hub(cfg)
        with _answers(cfg):
            from huggingface_hub import hf_hub_download

            hf_hub_download(cfg.source, CONFIG, revision=commit)
    except (ConfigError, OSError) as error:
        if not (dry_run and cfg.architecture):
            raise
        _log.warning("planned with model.architecture: %s", error)
        return cfg
    return replace(cfg, revision=commit)


def _commit_of_hub(cfg: ModelConfig) -> str:
    """Return the commit that the Hub names, or that the cache remembers where the Hub is not reached, which is said."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    revision = cfg.revision or constants.DEFAULT_REVISION
    try:
        with _answers(cfg):
            return str(HfApi().model_info(cfg.source, revision=revision, timeout=SECONDS).sha)
    except (ConfigError, OSError) as error:
        path = None
        with suppress(HFValidationError):  # a name that no repository has
            path = try_to_load_from_cache(cfg.source, CONFIG, revision=revision)
        if not isinstance(path, str):
            raise
        commit = Path(path).parent.name
        _log.warning("%s Taken from the cache: commit %s.", error, commit)
        return commit


def keep_commit(asked: ModelConfig, found: ModelConfig, run_dir: Path) -> None:
    """Write down which commit a run's teacher is, for its other ranks, and for the next start of the run."""
    if found.revision == asked.revision or not is_main_rank():
        return
    wanted = {"source": asked.source, "revision": asked.revision}
    if _kept_commit(run_dir, wanted) != found.revision:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / COMMITS, wanted | {"commit": found.revision})


def _kept_commit(run_dir: Path, asked: dict[str, Any]) -> str | None:
    path = run_dir / COMMITS
    try:
        kept = json.loads(path.read_text())
        is_this = {key: kept[key] for key in asked} == asked
        return str(kept["commit"]) if is_this else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, LookupError, TypeError):
        raise CheckpointError(f"{path} is damaged; delete it: the commit is asked of the Hub again.") from None


def _commit_of_main_rank(run_dir: Path, asked: dict[str, Any]) -> str:
    end = time.monotonic() + MAIN_RANK_SECONDS
    while (commit := _kept_commit(run_dir, asked)) is None:
        if time.monotonic() > end:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), str(run_dir / COMMITS))
        time.sleep(0.2)
    return commit


def download(cfg: ModelConfig) -> list[str]:
    """Fetch what the cache lacks of a teacher at its commit, and return the names of all its files.

    Where the Hub is not reached (`HF_HUB_OFFLINE`, no network) the cache will do if it has the weights.

    Raises:
        ConfigError: see `pinned`; the Hub is not asked and the cache lacks weights.
        CheckpointError: the repository has no safetensors.
        OSError: the Hub cannot be reached, or the disk has less room than the download needs.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from compactlm_nemo.models.hf import weight_names

    folder, where = snapshot(cfg), f"model.source={cfg.source}"
    try:
        with _answers(cfg):
            found = HfApi().model_info(cfg.source, revision=cfg.revision, files_metadata=True)
    except (ConfigError, OSError):
        if names := _whole_in_cache(folder):
            return names
        raise
    if not sys.stderr.isatty():
        disable_progress_bars()  # in a log one line at the end does
    sizes = {each.rfilename: int(each.size or 0) for each in found.siblings or []}
    names = [name for name in sizes if _is_small(name)]
    start, lacking = time.perf_counter(), {name: size for name, size in sizes.items() if not (folder / name).is_file()}
    with _answers(cfg):
        snapshot_download(cfg.source, revision=cfg.revision, allow_patterns=names)  # the index is one of them
        weights = weight_names(folder, sizes, where)
        _require_room(sum(lacking.get(name, 0) for name in weights))
        snapshot_download(cfg.source, revision=cfg.revision, allow_patterns=weights)
    names += weights
    fetched = [name for name in names if name in lacking]
    num_bytes, seconds = sum(lacking[name] for name in fetched), time.perf_counter() - start
    print(f"  {cfg.source} at {found.sha}: {len(fetched)} files, {num_bytes / 1e6:.1f} MB fetched, {seconds:.0f} s")
    return names


def _whole_in_cache(folder: Path) -> list[str]:
    """Return the names of a commit's files in the cache, none where weights are missing."""
    from compactlm_nemo.models.hf import weight_names

    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    try:
        weight_names(folder, names, str(folder))
    except CheckpointError:
        return []
    return names


def _is_small(name: str) -> bool:
    return name in (INDEX, CARD) or travels(name)


def _require_room(num_bytes: int) -> None:
    """Raise OSError where the disk of the cache cannot hold this many more bytes."""
    from huggingface_hub import constants

    cache = nearest = Path(constants.HF_HUB_CACHE)
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if num_bytes > free:
        sizes = f"{num_bytes / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free; HF_HOME names another disk"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{cache} ({sizes})")


@contextmanager
def _answers(cfg: ModelConfig) -> Iterator[None]:
    """Turn what the Hub answers instead of files into one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where, revision = f"model.source={cfg.source}", cfg.revision or constants.DEFAULT_REVISION
    endpoint = constants.ENDPOINT
    try:
        with way_to_hub(f"{where} is no folder here, and {endpoint} is asked for it"):
            yield
    except GatedRepoError:
        raise ConfigError(
            f"{where} is gated; ask for access at {endpoint}/{cfg.source}, and set HF_TOKEN to a token of that account."
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(
            f"model.revision={revision} is no branch, tag or commit of {cfg.source}; look at "
            f"{endpoint}/{cfg.source}/commits."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ConfigError(
            f"{where} is no folder here, and no repository of {endpoint} that this user may read; correct the name, or "
            "set HF_TOKEN where it is private."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{where} at {revision} is no folder here, nor whole in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
                "is set; unset it, or fetch it where there is a network."
            ) from None
        raise ConfigError(f"{where}: {endpoint} {_refusal(error.__cause__ or error)}.") from None
    except EntryNotFoundError:
        raise ConfigError(
            f"{where} has no {CONFIG} at {revision}; give a repository with a Hugging Face model."
        ) from None
    except HfHubHTTPError as error:
        raise ConfigError(f"{where}: {endpoint} {_refusal(error)}.") from None


def _refusal(error: BaseException) -> str:
    if status := status_of(error):
        return f"refused it ({status}: {answer_of(error)}); look at HF_TOKEN"
    return f"does not answer as a Hub does ({answer_of(error)}); correct HF_ENDPOINT"


def answer_of(error: BaseException) -> str:
    """Return what the Hub said, in one line."""
    return " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
