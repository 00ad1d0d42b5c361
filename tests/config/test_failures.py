"""Every failure is one line with a way out and an exit code that says whether to try again."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from compactlm_nemo.config import failures
from compactlm_nemo.config.command import recipe
from compactlm_nemo.config.failures import FAULT, FAULTS, TRY_AGAIN, USER, explain
from compactlm_nemo.config.load import CONF
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError, OtherRankError


class FailedJobError(RuntimeError):
    """Named as submitit's."""


class UncompletedJobError(RuntimeError):
    """Named as submitit's."""


def os_error(number: int, path: str = "/data/file") -> OSError:
    return OSError(number, os.strerror(number), path)


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def raised_while(error: BaseException, context: BaseException) -> BaseException:
    error.__context__ = context
    return error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("distill.lr=0 must be > 0."), USER, "error: distill.lr=0 must be > 0."),
        (os_error(errno.ENOSPC), TRY_AGAIN, "no space left for /data/file; free some"),
        (os_error(errno.EDQUOT), TRY_AGAIN, "no space left for /data/file; free some, or raise the quota"),
        (os_error(errno.EACCES), USER, "/data/file: Permission denied; let this user"),
        (os_error(errno.EROFS), USER, "/data/file: Read-only file system"),
        (os_error(errno.ENOENT), USER, "/data/file: No such file or directory; correct the path"),
        (os_error(errno.ESTALE), TRY_AGAIN, "/data/file: Stale file handle; this may pass"),
        (os_error(errno.EIO), TRY_AGAIN, "/data/file: Input/output error; this may pass"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), TRY_AGAIN, "this may pass"),
        (raised_from(RuntimeError("writer failed"), os_error(errno.ENOSPC)), TRY_AGAIN, "no space left for /data/file"),
        (raised_while(RuntimeError("writer failed"), os_error(errno.ENOSPC)), TRY_AGAIN, "no space left"),
        (RuntimeError("worker: OSError(28, 'No space left on device')"), TRY_AGAIN, "no space left for"),
        (CheckpointException("write", {0: (os_error(errno.EDQUOT), None)}), TRY_AGAIN, "no space left for /data/file"),
        (MemoryError(), USER, "out of memory"),
        (FailedJobError("sbatch: error: Memory\nsbatch: error: no"), USER, "Memory sbatch: error: no); correct hydra."),
        (UncompletedJobError("Job 7 has not produced any output"), TRY_AGAIN, "the same command goes on"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), USER, "out of memory (CUDA out of memory. Tried"),
        (RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:35"), TRY_AGAIN, "another rank is lost"),
        # A missing file that was met on the way explains nothing, nor does an error of a user that was handled.
        (raised_while(KeyError("rows"), os_error(errno.ENOENT)), FAULT, "KeyError: 'rows': a fault of this program"),
        (raised_while(KeyError("rows"), ConfigError("handled")), FAULT, "KeyError: 'rows': a fault"),
        (os_error(errno.EBADF), FAULT, "a fault of this program, please report it"),
        (ValueError("first\nsecond"), FAULT, "ValueError: first: a fault of this program"),
    ],
)  # fmt: skip
def test_what_an_exception_means(error: BaseException, code: int, words: str) -> None:
    failure = explain(error)
    assert failure.code == code
    assert words in failure.line and failure.line.startswith("error: ")
    assert "\n" not in failure.line


def test_a_write_that_fails_on_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
    assert explain(error, str(tmp_path)).code == FAULT
    monkeypatch.setattr(failures, "FULL", 2**63)
    assert explain(error, str(tmp_path / "not" / "there")).code == TRY_AGAIN


def test_the_stage_is_named(tmp_path: Path) -> None:
    error = os_error(errno.EACCES)
    error.add_note("prune")
    assert explain(error).line.startswith("error: prune: /data/file: ")


def ended(run: Callable[[Config], None], monkeypatch: pytest.MonkeyPatch, folder: Path) -> int | str | None:
    """Exit code of a command that does this."""
    monkeypatch.setattr(sys, "argv", ["recipe", f"run.dir={folder}", "model.source=x"])
    with pytest.raises(SystemExit) as end:
        recipe(run, None)()
    return end.value.code


def fails(error: BaseException) -> Callable[[Config], None]:
    def run(config: Config) -> None:
        raise error

    return run


def test_a_fault_leaves_one_line_and_its_traceback_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(fails(KeyError("rows")), monkeypatch, tmp_path) == FAULT
    [line] = capsys.readouterr().err.splitlines()
    (path,) = (tmp_path / FAULTS).iterdir()
    assert str(path) in line
    text = path.read_text()
    assert text.startswith(f"recipe run.dir={tmp_path}") and "Traceback" in text and "KeyError: 'rows'" in text


def test_where_the_runs_folder_cannot_be_written_the_traceback_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(failures.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert ended(fails(KeyError("rows")), monkeypatch, tmp_path / "file" / "run") == FAULT
    (path,) = (tmp_path / "tmp").iterdir()
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(("error", "seconds"), [(ConfigError("as all ranks"), 3.0), (OtherRankError("of rank 0"), 6.0)])
def test_other_ranks_leave_the_first_word_to_the_main_rank(
    error: Exception,
    seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slept: list[Any] = []

    def sleep(waits: float) -> None:
        slept.append((waits, signal.getsignal(signal.SIGTERM), capsys.readouterr().err))

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("COMPACTLM_EXIT_FILE", str(tmp_path / "exit"))
    assert ended(fails(error), monkeypatch, tmp_path) == USER
    assert (tmp_path / "exit").read_text() == "2\n"
    assert slept == [(seconds, signal.SIG_DFL, "")]
    assert re.match(r"rank 3 on \S+: error: ", capsys.readouterr().err)


def test_a_launch_of_several_ranks_says_once_what_is_wrong() -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "-m", "recipes.compress"]
    done = subprocess.run(
        [sys.executable, *words, "run.dir=x", "model.source=absent", "distill.steps=0"],
        cwd=CONF.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stderr.count("distill.steps=0 must be > 0") == 1, done.stderr


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    done = subprocess.run(
        f"{sys.executable} -m recipes.compress --help | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=CONF.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stderr == "" and done.returncode in (0, 128 + signal.SIGPIPE)
