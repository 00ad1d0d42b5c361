"""The index of a checkpoint is read without running what it says."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.checkpoint_metadata import read_metadata
from tests.support import commands


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.target}",)


def _arm(folder: Path, target: Path) -> None:
    folder.mkdir(parents=True)
    index = Metadata(state_dict_metadata={}, planner_data=Bomb(target))
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_the_bomb_of_these_tests_goes_off(tmp_path: Path) -> None:
    """The other tests are worth nothing if it does not."""
    _arm(tmp_path / "model", tmp_path / "ran")
    pickle.loads((tmp_path / "model" / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists()


def test_what_could_run_is_refused(tmp_path: Path) -> None:
    _arm(tmp_path / "model", tmp_path / "ran")
    with pytest.raises(CheckpointError, match=r"posix\.system.*nothing of it was run") as caught:
        read_metadata(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("settings", [["dry_run=true"], []])
def test_a_bomb_as_teacher_ends_a_recipe_in_one_line(tmp_path: Path, inputs: Path, settings: list[str]) -> None:
    _arm(tmp_path / "model" / "weights", tmp_path / "ran")
    done = commands.run(
        [
            "-m", "recipes.compress", f"run.dir={tmp_path}/run", f"model.source={tmp_path}/model",
            f"model.hf_assets={inputs}/teacher", f"data.train.a={inputs}/train.jsonl",
            f"data.heldout.a={inputs}/test.jsonl", *settings,
        ]
    )  # fmt: skip
    assert done.returncode == 2 and "posix.system" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(torch.Size([2]))])
def test_what_is_no_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="fetch the folder again"):
        read_metadata(tmp_path)


def test_a_missing_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=".metadata is damaged"):
        read_metadata(tmp_path)


def test_a_real_index_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": {"c": torch.ones(4)}, "plain": [1, "x"]}
    torch.distributed.checkpoint.save(weights, checkpoint_id=tmp_path)
    index, torchs = read_metadata(tmp_path), torch.distributed.checkpoint.FileSystemReader(tmp_path).read_metadata()
    for name in ("state_dict_metadata", "planner_data", "storage_data"):
        assert getattr(index, name) == getattr(torchs, name)
    stored = index.state_dict_metadata["a"]
    assert isinstance(stored, TensorStorageMetadata)
    assert stored.size == torch.Size([2, 3]) and stored.properties.dtype is torch.bfloat16


@dataclass
class _OldMetadata(Metadata):
    mcore_data: dict[str, Any] | None = None


@dataclass(frozen=True)
class _OldSavePlan(SavePlan):
    mcore_data: dict[str, Any] | None = None


def test_an_index_of_megatron_core_0_15_is_read_as_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cls in (("MCoreMetadata", _OldMetadata), ("MCoreSavePlan", _OldSavePlan)):
        monkeypatch.setattr(megatron_torch, name, cls)
        cls.__module__, cls.__qualname__ = megatron_torch.__name__, name  # pickle writes these
    plan = _OldSavePlan(items=[], planner_data={"a": ("a",)}, mcore_data={"a": {"shape": (2,)}})
    index = _OldMetadata(state_dict_metadata={}, planner_data=plan, mcore_data={})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    got = read_metadata(tmp_path)
    assert type(got) is Metadata and type(got.planner_data) is SavePlan
    assert got.planner_data.planner_data == {"a": ("a",)}


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # what Python 3.12 and 3.13 call it
def test_a_path_in_an_index_is_read_whichever_python_wrote_it(module: str, tmp_path: Path) -> None:
    index = Metadata(state_dict_metadata={}, planner_data=[Path("a/b")])
    data = pickle.dumps(index, protocol=2)
    name = type(Path()).__module__.encode() + b"\nPosixPath\n"
    assert data.count(name) == 1
    (tmp_path / ".metadata").write_bytes(data.replace(name, module.encode() + b"\nPosixPath\n"))
    assert read_metadata(tmp_path).planner_data == [Path("a/b")]
