"""Attention on a GPU is one kernel, whatever it is asked for: the scores of all pairs of tokens never exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu.attention import CASES
from tests.gpu.processes import start, written

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Case -> names of the operators that attend."""
    folder: Path = tmp_path_factory.mktemp("attention")
    log = folder / "log"
    assert start(["-m", "tests.gpu.attention", str(folder / "found.json")], log)() == 0, written(log)
    found: dict[str, list[str]] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_attention_never_falls_to_the_math_kernel(operators: dict[str, list[str]], case: str) -> None:
    names = operators[case]
    assert not any("softmax" in name or "math" in name for name in names), names
    assert any("attention" in name and "backward" in name for name in names), names
