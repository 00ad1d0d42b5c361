"""A function of settings becomes a command: `key=value` overrides in, an exit code and at most one line of error out.

Exit codes: 0 done, 1 a fault of this program, 2 settings or inputs, 75 try again (disk, network, another rank), and
128 + N after signal N.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from compactlm_nemo.config.failures import FAULT, FAULTS, Failure, explain, tell_exit_code
from compactlm_nemo.config.load import RUN, Root, compose_root, group_names, schema_reference
from compactlm_nemo.config.schema import Config

T = TypeVar("T")

MAIN_RANK_FIRST = 3.0
"""Seconds that other ranks leave to the main rank, whose launcher ends them as soon as it has told what failed."""


def recipe(run: Callable[[Config], None], description: str | None) -> Callable[[], None]:
    """Turn a function of a run's configuration into a command."""
    return recipe_root(RUN, run, description)


def recipe_root(root: Root[T], run: Callable[[T], None], description: str | None) -> Callable[[], None]:
    """Turn a function of a root's configuration into a command."""

    def command() -> None:
        overrides, folder = sys.argv[1:], None
        try:
            if {"-h", "--help"} & set(overrides):
                print(help_text(description or "", root))
            else:
                config = compose_root(root, overrides)
                folder = config.run.dir if isinstance(config, Config) and not config.dry_run else None
                run(config)
            sys.stdout.flush()  # here, where a reader that is gone is no fault
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:  # the reader of the output, `head` perhaps, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        except Exception as error:
            sys.exit(_report(explain(error, folder), error, folder))
        except BaseException as error:
            if type(error).__name__ != "CheckpointException":  # torch's, which is no Exception
                raise
            sys.exit(_report(explain(error, folder), error, folder))

    return command


def _report(failure: Failure, error: BaseException, run_dir: str | None) -> int:
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


def help_text(description: str, root: Root[Any] = RUN) -> str:
    """Return what `--help` prints: the recipe, the experiments and models of a run, and every setting."""
    lines = [description, "", f"usage: python -m {root.usage}", ""]
    if root is RUN:
        lines += [f"{group}s: {', '.join(group_names(group))}" for group in ("experiment", "model")] + [""]
    lines += ["settings (key = default):"]
    lines += [f"  {key} = {default}\n      {meaning}" for key, default, meaning, _ in schema_reference(root.schema)]
    return "\n".join(lines)
