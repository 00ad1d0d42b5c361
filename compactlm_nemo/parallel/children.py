"""No process that this one forks outlives it, also when it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

_is_registered = False
_parent = 0


def end_children_with_this_process() -> None:
    """Let the kernel end every process that is forked from now on, once the thread that forked it has ended.

    A library may fork; without its parent such a process could wait for ever. Processes that are started by another
    program's file (`subprocess`) are not meant. Linux only; elsewhere nothing happens.
    """
    global _is_registered
    if _is_registered or sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def remember_parent() -> None:
        global _parent
        _parent = os.getpid()

    def follow_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _parent:  # it ended before the kernel was told
            os._exit(128 + signal.SIGKILL)

    os.register_at_fork(before=remember_parent, after_in_child=follow_parent)
    _is_registered = True
