"""The measurements tell how they are used; what they measure is up to the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compactlm_nemo.config.load import CONF


@pytest.mark.parametrize("name", ["importance", "pairs"])
def test_help(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", "--help"], cwd=CONF.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m bench.{name}" in done.stdout and "--samples" in done.stdout
