"""A process that holds one tool's models and runs one pass when asked, so that two tools can take turns.

Both tools' processes stay alive during the whole measurement and the parent asks them alternately: what changes on the
machine meanwhile meets both. Requests and answers are one line of JSON each. Only the standard library and torch are
imported here: this module runs in both environments.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common.memory import peak_bytes

ROOT = Path(__file__).parents[2]


Pass = Callable[[], dict[str, Any] | None]
"""One whole pass over the calibration batches; returns its scores, name to tensor, or None."""


class Worker:
    """The parent's side."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.command = command
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        self.about: dict[str, Any] = self._answer()
        """What the child said when it was ready."""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def seconds(self, name: str) -> float:
        """Wall time of one pass."""
        return float(self._ask(do="time", name=name)["seconds"])

    def peak_bytes(self, name: str) -> int:
        """Peak memory of one pass; the first pass of a kind should not be this one."""
        return int(self._ask(do="memory", name=name)["bytes"])

    def save_scores(self, name: str, path: Path) -> None:
        """Write what the latest pass of this name returned as a safetensors file."""
        self._ask(do="save", name=name, path=str(path))

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.command)} ended with {self._process.wait()}; its error is above.")
        return json.loads(line)


def answers_only() -> Any:
    """The child's answer stream. Everything else that is printed, by libraries too, goes to standard error."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return stream


def serve(answers: Any, passes: dict[str, Pass], about: dict[str, Any]) -> None:
    """The child's side: say that it is ready, then obey until the parent closes the pipe."""
    latest: dict[str, Any] = {}

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    tell(passes=list(passes), **about)
    for line in sys.stdin:
        request = json.loads(line)
        name = request["name"]
        if request["do"] == "time":
            gc.collect()
            start = time.perf_counter()
            latest[name] = passes[name]()
            tell(seconds=time.perf_counter() - start)
        elif request["do"] == "memory":
            tell(bytes=peak_bytes(passes[name]))
        else:
            from safetensors.torch import save_file

            save_file({key: x.float().contiguous() for key, x in latest[name].items()}, request["path"])
            tell()
