"""The pages that are made from the tests are those that the tests make."""

from __future__ import annotations

import subprocess
import sys

from compactlm_nemo.config.load import CONF


def test_pages_say_what_the_tests_prove() -> None:
    """In a process of its own, as tests are collected for it."""
    words = [sys.executable, "-m", "tests.support.proofs", "--check"]
    done = subprocess.run(words, cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
