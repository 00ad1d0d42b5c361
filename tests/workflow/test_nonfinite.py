"""Nothing that is not finite is imported; tests/training/test_stability.py has what is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support import commands
from tests.support.tiny_run import command


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_with_a_weight_that_is_not_finite_is_not_imported(inputs: Path, tmp_path: Path, value: float) -> None:
    mine = tmp_path / "inputs"
    shutil.copytree(inputs, mine)
    weights = load_file(mine / "teacher" / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, mine / "teacher" / "model.safetensors", metadata={"format": "pt"})
    result = commands.run(command(mine, tmp_path / "run", recipe="import_model"))
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert "decoder.layers.mlp.linear_fc2.weight[2] holds NaN or infinity" in line and "model.source" in line
    assert not (tmp_path / "run" / "teacher" / "manifest.json").exists()
