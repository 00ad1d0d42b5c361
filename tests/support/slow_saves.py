"""A recipe whose training checkpoints take long to write: `python -m tests.support.slow_saves [key=value ...]`."""

from __future__ import annotations

import runpy
import time
from typing import Any

from compactlm_nemo.training import background_save

SECONDS = 0.4
"""Before the files of a checkpoint are written, and again before they are known as written."""


def main() -> None:
    """Run recipes.compress so."""
    write = background_save._write

    def slowly(*args: Any) -> Any:
        time.sleep(SECONDS)
        written = write(*args)
        time.sleep(SECONDS)
        return written

    background_save._write = slowly
    runpy.run_module("recipes.compress", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
