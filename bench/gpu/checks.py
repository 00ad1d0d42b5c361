"""The tests that need a GPU, each one's outcome recorded as it comes: figures of a wrong result mean nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.gpu.record import Record

ROOT = Path(__file__).parents[2]
OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
REASON = re.compile(r"^(?:FAILED|ERROR) (tests/\S+::.+?) - (.*)")


def test_files() -> list[str]:
    """Return the files that have tests for a GPU: other files would be imported for nothing."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in tests if "pytest.mark.gpu" in path.read_text()]


def measure(record: Record, *, dry: bool) -> None:
    """Record how many tests passed and failed, and why; a dry run lets them run on the CPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-o",
        "console_output_style=classic",
        "-rfE",
        "--tb=short",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | ({"GPU_TESTS_ON_CPU": "1"} if dry else {}) | {"COLUMNS": "400"}
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    with subprocess.Popen(
        [*command, *test_files()], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            if found := OUTCOME.match(line):
                outcomes[found[1]] = found[2]
                record.detail("tests", outcomes)
            if found := REASON.match(line):
                reasons[found[1]] = found[2]
    record.detail("reasons", reasons)
    counts = Counter(outcomes.values())
    record.figure("tests passed", counts["PASSED"], f"of {len(outcomes)}", at_least=len(outcomes))
    if process.returncode != 0:
        first = next(iter(reasons.items()), ("", f"pytest ended with {process.returncode}"))
        raise AssertionError(f"{counts['FAILED'] + counts['ERROR']} failed; {' '.join(first).strip()}")
