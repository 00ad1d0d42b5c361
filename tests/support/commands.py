"""Runs recipes as processes of their own, as `python -m recipes.VERB` does, without paying for the imports each time.

A fork server holds torch, Megatron and the package; every command is forked from it, with its own arguments, working
folder, environment and output. What a process does after its imports is the same, its exit code and its death too.
tests/test_recipes.py starts one command the plain way.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from compactlm_nemo.config.load import CONF

ROOT = CONF.parent


PRELOAD = [
    "torch",
    "torch.distributed",
    "megatron.core",
    "transformers.models.auto",
    "compactlm_nemo.workflow.runner",
    "compactlm_nemo.stages.candidate_search",
    "compactlm_nemo.stages.score_depth",
    "compactlm_nemo.stages.teacher_targets",
    "compactlm_nemo.stages.training_run",
    "compactlm_nemo.report.markdown",
]
"""Imported once in the fork server."""


GRACE_SECONDS = 20


multiprocessing.set_forkserver_preload(PRELOAD)


def start(
    words: list[str], out: Path, err: Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Start `python WORDS`, where WORDS are `-m MODULE ARGUMENT ...`; its output goes to the two files."""
    assert words[0] == "-m"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_main, args=(words[1:], str(out), str(err), str(cwd), dict(env or os.environ)))
    process.start()
    return process


def run(
    words: list[str], cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 600, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` to its end, as `subprocess.run` with captured output.

    The output is that of rank 0, then the errors of the others; the exit code the first that is not 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(words, Path(folder), ranks, cwd, env)
        _wait(processes, words, timeout)
        return ended(processes, words, Path(folder))


def start_ranks(
    words: list[str], folder: Path, ranks: int, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> list[ForkServerProcess]:
    """Start one process a rank of `python WORDS`; their output goes to `out{rank}` and `err{rank}` in the folder.

    Several ranks get the variables that torchrun would set (tests/test_slurm_jobs.py starts some with torchrun itself).
    """
    port, processes = str(_free_port()), []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        out, err = folder / f"out{rank}", folder / f"err{rank}"
        for path in (out, err):  # there to be read, however early the process is killed
            path.write_text("")
        processes.append(start(words, out, err, cwd, {**(env or os.environ), **(place if ranks > 1 else {})}))
    return processes


def ended(processes: list[ForkServerProcess], words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Return how the processes of `start_ranks` have ended, with the code of one that was not ended by force."""
    codes = sorted((process.exitcode for process in processes if process.exitcode), key=lambda c: c == -signal.SIGKILL)
    code = codes[0] if codes else 0
    errors = "".join((folder / f"err{rank}").read_text() for rank in range(len(processes)))
    return subprocess.CompletedProcess(words, code, (folder / "out0").read_text(), errors)


def _wait(processes: list[ForkServerProcess], words: list[str], timeout: float) -> None:
    """Until all have ended; when one fails, the others have some seconds to notice."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > end:
            failed = any(process.exitcode for process in processes)
            for process in processes:
                process.kill()
                process.join()
            if failed:
                return
            raise subprocess.TimeoutExpired(words, timeout)
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _main(words: list[str], out: str, err: str, cwd: str, env: dict[str, str]) -> None:
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False, buffering=1)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [cwd]
    torch.set_num_threads(1)
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
