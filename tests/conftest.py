"""Fixtures of several files of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_run import make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, texts and task of a run that takes seconds."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))
