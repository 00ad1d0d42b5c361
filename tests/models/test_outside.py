"""Folders and files from outside are data: nothing in them runs, fills the memory, or leads out of its folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.checkpoint import load_model, load_shards, model_state, naming_damage, save_model
from compactlm_nemo.models.checkpoint_metadata import read_metadata
from compactlm_nemo.models.outside import LARGEST, companion, gguf_header, own_file
from compactlm_nemo.models.source import WEIGHTS
from tests.models.test_checkpoint_metadata import Bomb
from tests.support import commands
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny
from tests.support.tiny_run import command


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_file(*keys: bytes, num_tensors: int = 0, num_keys: int | None = None) -> bytes:
    count = len(keys) if num_keys is None else num_keys
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, count) + b"".join(keys)


ARRAY = text("tokenizer.ggml.tokens") + struct.pack("<I", 9)


@pytest.mark.parametrize(
    "content",
    [
        gguf_file(ARRAY + struct.pack("<IQ", 4, 2**60)),  # 2^60 numbers
        gguf_file(ARRAY + struct.pack("<IQ", 8, 2**60)),  # 2^60 texts
        gguf_file(ARRAY + struct.pack("<IQ", 9, 2**60)),  # 2^60 arrays
        gguf_file(text("a") + struct.pack("<IQ", 8, 2**62)),  # a text of 2^62 bytes
        gguf_file(struct.pack("<Q", 2**63)),  # a name of 2^63
        gguf_file(num_keys=2**61),
        gguf_file(num_tensors=2**61),
        gguf_file(text("a") + struct.pack("<I", 77)),
        b"GGUF", b"", b"PK\3\4 something else",
    ],
)  # fmt: skip
def test_a_gguf_that_declares_more_than_it_holds_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.source={path} is not a readable GGUF file"):
        gguf_header(path)


def test_a_whole_gguf_passes(tmp_path: Path) -> None:
    keys = [
        text("a") + struct.pack("<II", 4, 7),
        text("b") + struct.pack("<I", 8) + text("hello"),
        ARRAY + struct.pack("<IQ", 8, 2) + text("x") + text("yy"),
        text("c") + struct.pack("<IIQ", 9, 12, 3) + struct.pack("<3d", 1, 2, 3),
        text("d") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 0, 2) + b"ab",
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file(*keys))
    gguf_header(path)
    path.write_bytes(gguf_file(*keys)[:-1])  # a byte less
    with pytest.raises(CheckpointError, match="declares 2 bytes where 1 are left"):
        gguf_header(path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_config_of_absurd_sizes_is_one_line_at_once(inputs: Path, tmp_path: Path, key: str, dry_run: bool) -> None:
    assert key in LARGEST
    mine = tmp_path / "inputs"
    shutil.copytree(inputs, mine)
    config = json.loads((mine / "teacher" / "config.json").read_text())
    (mine / "teacher" / "config.json").write_text(json.dumps(config | {key: 10**9}))
    done = commands.run(command(mine, tmp_path / "run", f"dry_run={str(dry_run).lower()}"), timeout=60)
    assert done.returncode == 2 and f"{key}=1000000000 is more than any model has" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_that_an_index_names_lies_in_its_folder(tmp_path: Path) -> None:
    assert own_file(tmp_path, "a.safetensors") == tmp_path / "a.safetensors"
    for name in ("../a.safetensors", "/etc/passwd", "sub/a.safetensors", "", "..", "."):
        with pytest.raises(CheckpointError, match="lies elsewhere"):
            own_file(tmp_path, name)


def test_an_index_that_leads_out_of_its_folder_is_one_line(inputs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "inputs"
    shutil.copytree(inputs, mine)
    teacher = mine / "teacher"
    (teacher / "model.safetensors").rename(mine / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    done = commands.run(command(mine, tmp_path / "run"))
    assert done.returncode == 2 and "names '../elsewhere.safetensors' as a file of its own" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_companion_that_is_a_link_to_elsewhere_is_not_copied(tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("of another user")
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"tokenizer.json is a link to {secret}, outside of its folder"):
        companion(folder, "tokenizer.json")
    (folder / "real.json").write_text("{}")
    (folder / "config.json").symlink_to("real.json")
    assert companion(folder, "config.json") == folder / "config.json"
    assert companion(folder, "vocab.json") is None


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blob, snapshot = tmp_path / "models--a--b" / "blobs" / "123", tmp_path / "models--a--b" / "snapshots" / "456"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert companion(snapshot, "config.json") == snapshot / "config.json"


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (_StorageInfo("../outside.distcp", 0, 4), "lies elsewhere"),
        (_StorageInfo("/etc/passwd", 0, 4), "lies elsewhere"),
        (_StorageInfo("gone.distcp", 0, 4), "which is not there"),
        (_StorageInfo("here.distcp", 2, 9), "has 10 bytes, by the index 11"),
        (_StorageInfo("here.distcp", -2, 4), "by the index 2"),
        (_StorageInfo("here.distcp", 0, 10), None),
    ],
)
def test_the_index_of_a_checkpoint_stays_in_its_folder_and_files(
    tmp_path: Path, place: Any, problem: str | None
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "here.distcp").write_bytes(bytes(10))
    (tmp_path / "outside.distcp").write_bytes(bytes(10))
    index = Metadata(state_dict_metadata={}, storage_data={MetadataIndex("a"): place})
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    if problem is None:
        read_metadata(folder)
    else:
        with pytest.raises(CheckpointError, match=problem):
            read_metadata(folder)


def _bombs(rank: int, world: int, root: Path) -> None:
    """A weight stored as an object, and the plain part of a checkpoint, as an index and a file can say it."""
    mesh = mesh_of()
    _, model = filled(root / "llama", mesh)
    for kind in ("object", "common"):
        save_model(root / kind, model)
        folder = root / kind / WEIGHTS
        if kind == "object":
            index = read_metadata(folder)
            key = "embedding.word_embeddings.weight"  # Megatron does not check its shape, so torch would read it
            assert key in index.state_dict_metadata
            stored = pickle.dumps(Bomb(root / "ran"))
            (folder / "bomb.distcp").write_bytes(stored)
            place = next(at for at in index.storage_data if at.fqn == key)
            del index.storage_data[place]
            index.storage_data[MetadataIndex(key)] = _StorageInfo("bomb.distcp", 0, len(stored))
            index.state_dict_metadata[key] = BytesStorageMetadata()
            (folder / ".metadata").write_bytes(pickle.dumps(index))
            with pytest.raises(CheckpointError, match=f"stores {key} as an object and not as a tensor"):
                load_model(root / kind, model)
        else:
            torch.save({"a": Bomb(root / "ran")}, folder / "common.pt")
            with pytest.raises(CheckpointError, match="cannot be read .*; delete it") as error:
                load_model(root / kind, model)
            assert "\n" not in str(error.value)
            with pytest.raises(CheckpointError, match="cannot be read"), naming_damage(folder):
                dist_checkpointing.load_common_state_dict(str(folder))
        assert not (root / "ran").exists()
    save_model(root / "whole", model)
    asked = dict(os.environ)
    load_shards(model_state(model), root / "whole" / WEIGHTS)
    assert dict(os.environ) == asked


@pytest.mark.parametrize("variable", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
def test_a_bomb_in_weights_does_not_go_off(
    tmp_path: Path, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment tells torch, which other tools ask to set."""
    for name in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    save_tiny("llama", tmp_path / "llama")
    run_ranks(_bombs, 1, tmp_path, tmp_path)
