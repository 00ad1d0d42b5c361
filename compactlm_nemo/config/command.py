"""A function of settings becomes a command: `key=value` overrides in, an exit code and at most one line of error out.

Exit codes: 0 done, 1 a fault of this program, 2 settings or inputs, 3 a limit of the gate does not hold, 75 try again
(disk, network, another rank), and 128 + N after signal N.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from compactlm_nemo.config.application import Application
from compactlm_nemo.config.failures import explain, pipe_closed, report
from compactlm_nemo.config.load import RUN, Root
from compactlm_nemo.config.schema import Config

T = TypeVar("T")


def recipe(run: Callable[[Config], None], description: str | None, *, leaves_runs: bool = True) -> Callable[[], None]:
    """Turn a function of a run's configuration into a command.

    Args:
        leaves_runs: False for one that only looks, and of which a sweep leaves nothing either.
    """
    return recipe_root(RUN, run, description, leaves_runs=leaves_runs)


def recipe_root(
    root: Root[T], run: Callable[[T], None], description: str | None, *, leaves_runs: bool = True
) -> Callable[[], None]:
    """Turn a function of a root's configuration into a command."""

    def command() -> None:
        application = Application(root, run, description or "", leaves_runs)
        try:
            code = application.start(sys.argv[1:])
            sys.stdout.flush()  # here, where a reader that is gone is no fault
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:  # the reader of the output, `head` perhaps, has seen enough
            sys.exit(pipe_closed())
        except Exception as error:
            sys.exit(report(explain(error, application.folder), error, application.folder))
        except BaseException as error:
            if type(error).__name__ != "CheckpointException":  # torch's, which is no Exception
                raise
            sys.exit(report(explain(error, application.folder), error, application.folder))
        if code:
            sys.exit(code)

    return command
