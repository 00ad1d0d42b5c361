"""What an exception means to a user: one line that says what failed and the way out, and an exit code."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from compactlm_nemo.config.load import HYDRA_ERRORS, one_line
from compactlm_nemo.errors import CompactLMError, GateFailed, Interrupted, OtherRankError

FAULT, USER, GATE, TRY_AGAIN = 1, 2, 3, 75
"""Exit codes: a fault of this program; settings or inputs; a student that the gate holds back; what may pass by itself,
so that a job is requeued."""

EXIT_FILE = "COMPACTLM_EXIT_FILE"
"""Variable with the path of the file that takes a run's exit code; `slurm/run.sbatch` sets it."""

FAULTS = "faults"
"""Folder of `run.dir` with the tracebacks of faults, and the stacks of ranks that hung."""

FULL = 2**20
"""Free bytes of a file system below which a write that failed is taken for one that found no space."""

MAIN_RANK_FIRST = 3.0
"""Seconds that other ranks leave to the main rank, whose launcher ends them as soon as it has told what failed."""

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST)
_PASSING = (
    errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EAGAIN,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE,
)  # fmt: skip

_LOST_RANK = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "nccl")
_JOB_ERRORS = ("FailedJobError", "UncompletedJobError")  # of submitit, which a launcher of Hydra's may be
_NETWORK_ERRORS = ("DistNetworkError", "DistBackendError", "DistStoreError")


@dataclass(frozen=True)
class Failure:
    """A failure has one line for the user, an exit code, and says on which ranks it is."""

    line: str
    code: int
    is_of_another_rank: bool = False
    is_of_all_ranks: bool = False
    """Whether every rank has the same to tell."""


def explain(error: BaseException, run_dir: str | None = None) -> Failure:
    """Return what an exception means; what is not known here is a fault of this program.

    Args:
        run_dir: Folder that the command writes to, None where it writes nothing.
    """
    chain = list(_chain(error))
    if isinstance(error, Interrupted):
        return Failure(f"stopped: {error}", error.code, is_of_all_ranks=True)
    if isinstance(error, GateFailed):
        return Failure(f"gate: {error}", GATE, is_of_all_ranks=True)
    if isinstance(error, CompactLMError):
        return Failure(f"error: {error}", USER, isinstance(error, OtherRankError))
    if isinstance(error, HYDRA_ERRORS):
        ours = next((cause for cause in chain if isinstance(cause, CompactLMError)), None)
        return Failure(f"error: {ours or one_line(error)}", USER)
    stage = "".join(f"{note}: " for note in getattr(error, "__notes__", []))
    for cause in chain:
        # A wrong path that somebody met and went on from explains no later failure.
        was_met = cause is not error and cause is not error.__cause__
        if isinstance(cause, OSError) and was_met and cause.errno in (*_FORBIDDEN, *_WRONG_PATH):
            continue
        if isinstance(cause, OSError) and (failure := _of_system(cause.errno, _path_of(cause), stage)):
            return failure
    if _is_out_of_memory(chain):
        return Failure(
            f"error: {stage}out of memory ({_first_line(error)}); lower micro_batch, set distill.recompute=selective "
            "or full, or spread the models over more ranks (parallel.tp, parallel.pp).",
            USER,
        )
    text = " ".join(str(cause) for cause in chain)
    for number in (*_FULL_DISK, errno.EROFS, errno.ESTALE, errno.EIO):  # raised again as text by those who write
        if os.strerror(number) in text and (failure := _of_system(number, run_dir, stage)):
            return failure
    if run_dir is not None and _is_full(Path(run_dir)):
        return Failure(_full_disk(run_dir, stage), TRY_AGAIN)
    if any(type(cause).__name__ in _NETWORK_ERRORS for cause in chain) or any(w in text.lower() for w in _LOST_RANK):
        return Failure(
            f"error: {stage}the connection to another rank is lost ({_first_line(error)}); the same command goes on.",
            TRY_AGAIN,
            is_of_another_rank=True,
        )
    if type(error).__name__ in _JOB_ERRORS:
        was_refused = "sbatch" in text
        out = "correct hydra.launcher" if was_refused else "its log is in run.dir/.submitit; the same command goes on"
        told = " ".join(str(error).split())
        return Failure(f"error: a job of the sweep failed ({told}); {out}.", USER if was_refused else TRY_AGAIN)
    return Failure(
        f"error: {stage}{type(error).__name__}: {_first_line(error)}: a fault of this program, please report it", FAULT
    )


def report(failure: Failure, error: BaseException, run_dir: str | None) -> int:
    """Print one line about a failure, and return the exit code; the main rank's comes first, then it is the launch's.

    Other ranks fail because one did, or as all do. They wait until the launcher ends them, and speak when it does not:
    then theirs was the only failure.
    """
    line, rank = failure.line, os.environ.get("RANK", "0")
    if failure.is_of_all_ranks and rank != "0":
        return failure.code
    if failure.code == FAULT:
        line += f" (traceback in {_keep_traceback(error, run_dir)})"
    if failure.is_of_another_rank or rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stdout.flush()
        time.sleep(MAIN_RANK_FIRST * (2 if failure.is_of_another_rank else 1))
        line = f"rank {rank} on {socket.gethostname()}: {line}"
    print(line, file=sys.stderr, flush=True)
    tell_exit_code(failure.code)
    return failure.code


def _keep_traceback(error: BaseException, run_dir: str | None) -> Path:
    """Write the traceback of a fault into the run's folder, or a temporary one, and return the file."""
    text = " ".join(sys.argv) + "\n" + "".join(traceback.format_exception(error))
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-rank{os.environ.get('RANK', '0')}-{os.getpid()}.txt"
    folders = [Path(tempfile.gettempdir())]
    if run_dir is not None:
        folders.insert(0, Path(run_dir) / FAULTS)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="replace")
        except OSError:
            continue
        return folder / name
    print(text, file=sys.stderr)  # nowhere to write: better here than lost
    return Path("the lines above")


def pipe_closed() -> int:
    """Return the exit code of a command whose output nobody reads any more, and let what is left in it go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def tell_exit_code(code: int) -> None:
    """Write an exit code where the batch script of a job looks for it, as the launcher of ranks ends with 1 for any."""
    path = os.environ.get(EXIT_FILE)
    if path:
        try:
            Path(path).write_text(f"{code}\n")
        except OSError as error:
            print(f"{EXIT_FILE}={path} cannot be written ({error.strerror})", file=sys.stderr)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, what it came from, and what a distributed checkpoint collected from its ranks."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += [cause.__cause__, cause.__context__]
        by_rank = getattr(cause, "failures", None)  # of torch's CheckpointException
        if isinstance(by_rank, dict):
            waiting += [failed[0] if isinstance(failed, tuple) else failed for failed in by_rank.values()]


def _of_system(number: int | None, path: str | None, stage: str) -> Failure | None:
    """Return what an error of the operating system means; None for those that only a fault can cause."""
    if number is None:
        return None
    what = f"error: {stage}{path or 'a file'}: {os.strerror(number)}"
    if number in _FULL_DISK:
        return Failure(_full_disk(path, stage), TRY_AGAIN)
    if number in _FORBIDDEN:
        return Failure(f"{what}; let this user read and write there, or choose another run.dir.", USER)
    if number in _WRONG_PATH:
        return Failure(f"{what}; correct the path, or run the stage that makes it.", USER)
    if number in _PASSING:
        return Failure(f"{what}; this may pass: the same command goes on from the last good state.", TRY_AGAIN)
    return None


def _full_disk(path: str | None, stage: str) -> str:
    return (
        f"error: {stage}no space left for {path or 'a file'}; free some, or raise the quota: the same command goes on "
        "from the last good state."
    )


def _path_of(error: OSError) -> str | None:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return names[-1] if names else None


def _is_full(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free < FULL
    except OSError:
        return False


def _is_out_of_memory(chain: list[BaseException]) -> bool:
    return any(
        isinstance(cause, MemoryError)
        or type(cause).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(cause)
        for cause in chain
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no message"])[0][:300]
