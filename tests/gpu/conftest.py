"""Tests of this folder run where a GPU is; on the CPU only when asked to, so that they are no news to a GPU.

The device under test is what the package chooses: the GPU. With GPU_TESTS_ON_CPU=1 it is the CPU.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("GPU_TESTS_ON_CPU"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or GPU_TESTS_ON_CPU=1"))
