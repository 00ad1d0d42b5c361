"""Runs recipes as processes of their own, as `python -m recipes.VERB` does, without paying for the imports each time.

A fork server holds torch, Megatron and the package; every command is forked from it, with its own arguments, working
folder, environment and output. What a process does after its imports is the same, its exit code and its death too.
tests/test_recipes.py starts one command the plain way.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
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
    "compactlm_nemo.stages",
    "compactlm_nemo.verbs",
    "compactlm_nemo.caching",
    "compactlm_nemo.distilling",
    "compactlm_nemo.report.build",
]
"""Imported once in the fork server."""
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
    """Run `python WORDS` to its end, as `subprocess.run` with captured output; several ranks by the real launcher."""
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        settings = {**(env or os.environ), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*launcher, *words], cwd=cwd, env=settings, capture_output=True, text=True, timeout=timeout
        )
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(words, out, err, cwd, env)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


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
