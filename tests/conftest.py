"""Fixtures of several files of tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny_run import make_inputs


@pytest.fixture(scope="module", autouse=True)
def folders_of_a_module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders that the fixtures of a module made go with it, unless a test failed: pytest keeps them to the end."""
    base = tmp_path_factory.getbasetemp()
    before, failed = set(base.iterdir()), request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        for folder in set(base.iterdir()) - before:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, texts and task of a run that takes seconds."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))
