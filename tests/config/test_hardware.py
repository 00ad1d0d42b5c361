"""Whether a machine has CUDA, told without torch; and what `model.precision=auto` becomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compactlm_nemo.config import hardware, model
from compactlm_nemo.config.hardware import can_compile, has_cuda, torch_has_cuda
from compactlm_nemo.config.load import compose, schema_reference, to_yaml
from compactlm_nemo.config.model import Precision
from compactlm_nemo.workflow.dry_run import plan_lines
from compactlm_nemo.workflow.stage_table import STAGES

RUN = ["run.dir=absent", "model.source=absent", "dry_run=true"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a driver and torch for CUDA."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(hardware, "DRIVER", (tmp_path / "nvidiactl",))
    monkeypatch.setattr(hardware, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "version.py").write_text("__version__ = '2.9.0a0+nv'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    return tmp_path


def test_this_machine_is_told_as_torch_tells_it() -> None:
    assert torch_has_cuda() == (torch.version.cuda is not None)
    assert has_cuda() == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("visible", "told"),
    [(None, True), ("0,1", True), ("3", True), ("GPU-8f2a", True), ("MIG-1", True),
     ("", False), ("-1", False), ("-1,0", False), ("NoDevFiles", False)],
)  # fmt: skip
def test_hidden_devices_are_not_there(machine: Path, monkeypatch: pytest.MonkeyPatch, visible: str, told: bool) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert has_cuda() is told


def test_a_machine_without_driver_or_with_torch_for_cpus_has_none(machine: Path) -> None:
    assert has_cuda()
    (machine / "version.py").write_text("cuda: Optional[str] = None\ndebug = 'cuda'\n")
    assert not has_cuda()
    (machine / "version.py").write_text("cuda = '12.8'\n")
    assert has_cuda()
    (machine / "nvidiactl").unlink()
    assert not has_cuda()


@pytest.mark.parametrize(("is_here", "taken", "words"), [
    (True, Precision.bf16, "precision: bf16, as model.precision=auto is on this machine with a CUDA device"),
    (False, Precision.fp32, "precision: fp32, as model.precision=auto is on this machine with no CUDA device"),
])  # fmt: skip
def test_auto_is_what_the_device_is_fast_at_and_is_never_written_down(
    monkeypatch: pytest.MonkeyPatch, is_here: bool, taken: Precision, words: str
) -> None:
    monkeypatch.setattr(model, "has_cuda", lambda: is_here)
    for overrides in ([], ["model.precision=auto"]):
        config = compose([*RUN, *overrides])
        assert config.model.precision is taken
        assert f"  precision: {taken.name}\n" in to_yaml(config)
        assert STAGES["import_model"].settings(config) == {"model.precision": taken}
        assert any(line.startswith(words) for line in plan_lines(config, None, []))


def test_a_given_precision_is_taken_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_here in (True, False):
        monkeypatch.setattr(model, "has_cuda", lambda is_here=is_here: is_here)
        for name in ("bf16", "fp32"):
            config = compose([*RUN, f"model.precision={name}"])
            assert config.model.precision.name == name
    assert "precision: bf16" in plan_lines(compose([*RUN, "model.precision=bf16"]), None, [])


def test_the_manual_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_here in (True, False):
        monkeypatch.setattr(model, "has_cuda", lambda is_here=is_here: is_here)
        assert [row[1] for row in schema_reference() if row[0] == "model.precision"] == ["auto"]


def test_compiling_takes_a_compiler_and_no_order_against_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CC", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not can_compile()
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert can_compile()
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert not can_compile()
    config = replace(compose([*RUN, "model.compile=true"]), dry_run=False)
    assert any("model.compile=true needs a C compiler" in line for line in STAGES["distill"].problems(config, []))
