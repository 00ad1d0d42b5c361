"""A training's run at Weights & Biases: one over all its processes, which no failure of W&B ends.

`metrics.jsonl` is the truth and W&B its copy. W&B's own step is the number of the global batch, `train/batch`: it grows
over rewinds and is the same again when a killed training repeats a step. So a process asks first up to which batch W&B
has the training - the server when online, the files of earlier processes when offline, which a kill leaves without
their end - sends what is missing from `metrics.jsonl`, and from then on only batches that W&B does not have.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rich.console import Console

from compactlm_nemo.artifacts import atomic_write_text
from compactlm_nemo.config.run import WandbConfig, WandbMode, WandbProject

WANDB_ID = "wandb_id"
BATCH = "train/batch"
"""Number of the global batch, 0-based: the step, and the batches that rewinds have passed over."""

FINISH_SECONDS = 300.0
"""Longest wait at the end for a network that is down; what is left is on disk."""

Mode = Literal["disabled", "offline", "online"]
_MODE_WORDS: dict[str, Mode] = {
    "disabled": "disabled", "offline": "offline", "dryrun": "offline", "online": "online", "run": "online",
}  # fmt: skip
_HEADER_BYTES, _BLOCK_BYTES, _RECORD_HEADER = 7, 32768, struct.Struct("<IHB")
_FULL, _LAST = 1, 4

_log = logging.getLogger(__name__)


def wandb_mode(mode: WandbMode) -> Mode:
    """Return W&B's word for a mode; auto heeds WANDB_MODE, else it is online with a login and disabled without."""
    if mode is not WandbMode.auto:
        return _MODE_WORDS[mode.name]
    if word := os.environ.get("WANDB_MODE"):
        if word not in _MODE_WORDS:
            _log.warning("WANDB_MODE=%s is none of %s; W&B stays off.", word, ", ".join(_MODE_WORDS))
        return _MODE_WORDS.get(word, "disabled")
    return "online" if has_login() else "disabled"


def has_login() -> bool:
    """Whether WANDB_API_KEY is set, or ~/.netrc or the file NETRC has W&B's host (that of WANDB_BASE_URL)."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    has_entry = netrc.is_file() and host in netrc.read_text(errors="replace").split()
    return bool(os.environ.get("WANDB_API_KEY")) or has_entry


def default_entity() -> str | None:
    """Return the user or team that W&B takes for a login when no entity is given, as the server says."""
    import wandb

    return wandb.Api().default_entity


class WandbRun:
    """Sends the metrics of a training to W&B while W&B works; its first failure is one warning, and the last call.

    Args:
        folder: Gets `wandb_id`, and W&B's files in `wandb/` unless WANDB_DIR names another place.
        cfg: How the run is called; null is left to W&B's environment.
        config: Shown as the run's config; must hold no secret.
        lines: Lines of `metrics.jsonl` from earlier processes of this training; W&B is sent what it lacks of them.
    """

    def __init__(self, folder: Path, cfg: WandbConfig, config: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        self._folder, self._cfg, self._config = folder, cfg, config
        self._run: Any = None
        self._has_failed = False
        self._next_batch = 0
        mode = wandb_mode(cfg.mode)
        if mode != "disabled":
            self._guard("did not start", lambda: self._start(mode, lines))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of 0-based `step`, unless an earlier process has sent those of the same batch."""
        batch = int(metrics.get(BATCH, step))
        if self._run is not None and batch >= self._next_batch:
            self._guard("failed", lambda: self._run.log({"step": step} | metrics, step=batch, commit=True))
            self._next_batch = batch + 1

    def log_folder(self, name: str, kind: str, folder: Path, metadata: dict[str, Any]) -> None:
        """Log a folder as an artifact that refers to its files; W&B reads them for their MD5 and copies none."""
        if self._run is not None:
            self._guard("did not log an artifact", lambda: self._log_folder(name, kind, folder, metadata))

    def _log_folder(self, name: str, kind: str, folder: Path, metadata: dict[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(name, kind, metadata=metadata)
        artifact.add_reference(folder.resolve().as_uri())
        self._run.log_artifact(artifact)

    def finish(self, exit_code: int) -> bool:
        """End the run for this process, later ones go on with it; return whether W&B has all that it was sent."""
        if self._run is not None:
            self._guard("did not finish", lambda: self._run.finish(exit_code=exit_code))
        is_sent = self._run is not None
        if self._has_failed:  # a service that is dead would fail the next training too, and print a traceback at exit
            with suppress(Exception):
                import wandb

                wandb.teardown(exit_code)
        return is_sent

    def _guard(self, what: str, act: Callable[[], object]) -> None:
        """Call `act`; an error, be it network, login, service or disk, ends no training."""
        try:
            act()
        except Exception as error:
            self._run, self._has_failed = None, True
            reason = str(error).strip().partition("\n")[0]
            _log.warning(
                "W&B %s (%s: %s); training goes on without it, metrics.jsonl has all metrics, and the next process of "
                "this training sends what W&B lacks.", what, type(error).__name__, reason,
            )  # fmt: skip

    def _start(self, mode: Mode, lines: list[dict[str, Any]]) -> None:
        import wandb

        cfg, environment = self._cfg, os.environ
        if "WANDB_RUN_ID" in environment:
            _log.warning("WANDB_RUN_ID is not heeded: each training has an id of its own, in %s.", self._folder)
        finish_seconds = float(environment.get("WANDB_FINISH_TIMEOUT") or FINISH_SECONDS)
        run = wandb.init(
            mode=mode,
            entity=cfg.entity,
            project=cfg.project,
            name=cfg.name,
            group=cfg.group,
            job_type=cfg.job_type,
            tags=cfg.tags or None,
            notes=cfg.notes,
            id=_kept_id(self._folder),
            resume="allow",
            dir=None if environment.get("WANDB_DIR") else str(self._folder),
            config=self._config,
            settings=wandb.Settings(console="off", finish_timeout=finish_seconds, finish_timeout_raises=True),
        )
        self._next_batch = self._sent_offline(run) if mode == "offline" else run.starting_step
        self._run = run
        for line in lines:
            values = {name: float("nan") if value is None else value for name, value in line.items()}
            self.log(int(values.pop("step")), values)

    def _sent_offline(self, run: Any) -> int:
        """Return the first batch that the files of earlier offline processes lack; say how all are sent."""
        parts = Path(run.settings.wandb_dir).glob(f"offline-run-*-{run.id}/run-{run.id}.wandb")
        earlier = [path for path in parts if path != Path(run.settings.sync_file)]
        folders = Path(run.settings.wandb_dir) / f"offline-run-*-{run.id}"
        Console(soft_wrap=True).print(f"  W&B is offline; to send all parts of this run: wandb sync {folders}")
        return 1 + max([-1, *(step for path in earlier for step in _steps_in(path))])


def log_table(
    folder: Path, mode: WandbMode, project: WandbProject, name: str | None, title: str, rows: list[dict[str, Any]]
) -> bool:
    """Log rows as a table of a W&B run of its own, whose files lie in a folder; return whether W&B is on.

    Args:
        rows: With numbers, text and None; a column is a key.
    """
    is_on = wandb_mode(mode)
    if is_on == "disabled":
        return False
    import wandb

    columns = list(dict.fromkeys(key for row in rows for key in row))
    run = wandb.init(
        mode=is_on,
        entity=project.known_entity,
        project=project.known_project,
        name=name,
        job_type="compare",
        dir=None if os.environ.get("WANDB_DIR") else str(folder),
        settings=wandb.Settings(console="off"),
    )
    data: list[Any] = [[row.get(key) for key in columns] for row in rows]
    run.log({title: wandb.Table(columns=[*columns], data=data)})
    run.finish()
    return True


def _kept_id(folder: Path) -> str:
    """Return the W&B id of the training whose progress is in a folder, a new one when there is none."""
    path = folder / WANDB_ID
    if path.is_file() and (kept := path.read_text().strip()):
        return kept
    new = secrets.token_hex(4)
    atomic_write_text(path, new + "\n")
    return new


def _steps_in(path: Path) -> Iterator[int]:
    """Yield W&B's own step of every row in a file of an offline run, as far as the file is whole."""
    from wandb.proto import wandb_internal_pb2

    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made by protobuf at import
        record.ParseFromString(payload)
        if record.HasField("history"):
            yield record.history.step.num


def _payloads(data: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file; the last may be cut short and is left out.

    After 7 bytes follow blocks of 32 KiB as in LevelDB's log: a piece has checksum, length and kind (1 a whole record,
    2 its first, 3 a middle and 4 its last piece), and less than a piece's header at the end of a block is padding.
    """
    position, pieces = _HEADER_BYTES, b""
    while position + _RECORD_HEADER.size <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _RECORD_HEADER.size:
            position += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(data, position)
        position += _RECORD_HEADER.size
        if position + length > len(data) or not kind:
            return
        pieces += data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield pieces
            pieces = b""
