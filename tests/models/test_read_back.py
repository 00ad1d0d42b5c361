"""`export.verify`: the tool that will read an exported folder reads what was exported, or says what not."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.models import readers
from compactlm_nemo.models.hf import export_hf, hf_tensors, open_hf
from compactlm_nemo.models.read_back import read_back, read_back_problem
from tests.support import transformers4
from tests.support.tiny_models import save_tiny

TIED = ("model.embed_tokens.weight", "lm_head.weight")


def _exported(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_tiny(case, folder / "source")
    dims, source = open_hf(folder / "source")
    export_hf(folder / "source", folder / "hf", dims, source, dtype)
    return folder / "hf"


def _ours(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    dims, source = open_hf(folder)
    return hf_tensors(dims, source, dtype)


@pytest.mark.parametrize("case", ["qwen3_tied", "mixtral", "qwen2_moe", "gpt_oss"])
def test_transformers_reads_what_was_exported(case: str, tmp_path: Path) -> None:
    folder = _exported(case, tmp_path, torch.bfloat16)
    tool = read_back(sys.executable, "hf", folder, _ours(tmp_path / "source", torch.bfloat16), TIED)
    assert tool.startswith("transformers 5.")


def test_transformers_4_reads_what_was_exported(tmp_path: Path) -> None:
    folder = _exported("mixtral", tmp_path)
    tool = read_back(str(transformers4.python()), "hf", folder, _ours(tmp_path / "source"), TIED)
    assert tool.startswith("transformers 4.")


@pytest.mark.slow
def test_every_difference_is_told(tmp_path: Path) -> None:
    """One value, a number format, a weight that a reader makes up, and one that nobody knows of."""
    folder = _exported("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"transformers 5\S+ in export.verify=\S+ reads 2 weights of .*hf otherwise"):
        read_back(sys.executable, "hf", folder, _ours(tmp_path / "source"), TIED)
    ours = [(name, value.bfloat16() if "q_proj" in name else value) for name, value in _ours(tmp_path / "source")]
    with pytest.raises(
        RuntimeError, match=r"first model.layers.0.self_attn.q_proj.weight \(number format float32, not"
    ):
        read_back(sys.executable, "hf", _exported("llama", tmp_path / "again"), ours, TIED)
    with pytest.raises(RuntimeError, match="first lm_head.weight, which it has beside them"):
        fewer = [pair for pair in _ours(tmp_path / "again" / "source") if pair[0] != "lm_head.weight"]
        read_back(sys.executable, "hf", tmp_path / "again" / "hf", fewer, TIED)


def test_a_folder_that_the_tool_cannot_load_is_one_line(tmp_path: Path) -> None:
    folder = _exported("llama", tmp_path)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"does not load .*hf: .*; it is not taken for done") as raised:
        read_back(sys.executable, "hf", folder, _ours(tmp_path / "source"), TIED)
    assert "\n" not in str(raised.value)


def _python(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_tool_that_is_not_there_or_dies_is_one_line(tmp_path: Path) -> None:
    missing = json.dumps({"missing": "No module named nemo"})
    lacks = _python(tmp_path / "lacks", f"echo '{missing}' > $4")
    with pytest.raises(ConfigError, match=r"lacks a package \(No module named nemo\); install it there"):
        read_back(lacks, "nemo2", tmp_path, [], TIED)
    killed = _python(tmp_path / "killed", "kill -9 $$")
    with pytest.raises(CheckpointError, match="it was killed, most likely as the memory was full"):
        read_back(killed, "hf", tmp_path, [], TIED)
    with pytest.raises(ConfigError, match="cannot be run"):
        read_back(str(tmp_path / "none"), "hf", tmp_path, [], TIED)


def test_what_an_environment_lacks_is_told_before_the_start(tmp_path: Path) -> None:
    assert read_back_problem(sys.executable, "hf") is None
    assert "has no package nemo, which reads export.format=nemo2" in str(read_back_problem(sys.executable, "nemo2"))
    assert "cannot be run (No such file or directory)" in str(read_back_problem(str(tmp_path / "none"), "hf"))
    assert "has no package megatron" in str(read_back_problem(_python(tmp_path / "bare", "exit 1"), "bridge"))


def test_the_tool_is_no_rank_of_our_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "3")
    seen = tmp_path / "seen"
    python = _python(tmp_path / "python", f'env > {seen}; echo \'{{"tool": "t 1", "weights": {{}}}}\' > $4')
    assert read_back(python, "hf", tmp_path, [], TIED) == "t 1"
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert not names & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"}


def test_grouped_experts_and_wrappers_have_plain_names() -> None:
    state = {"module.module.decoder.layers.0.mlp.experts.linear_fc1.weight12": torch.ones(1), "a._extra_state": None}
    assert list(readers._parameters(state)) == ["decoder.layers.0.mlp.experts.local_experts.12.linear_fc1.weight"]


def test_a_digest_tells_bytes_shape_and_number_format_apart() -> None:
    one = torch.arange(6, dtype=torch.float32)
    others = [one.view(2, 3), one.bfloat16(), one + 1e-6]
    digests = [readers.digest(tensor) for tensor in (one, *others)]
    assert len({json.dumps(digest) for digest in digests}) == 4
    assert readers.digest(one.view(2, 3).T.contiguous().T) == readers.digest(one.view(2, 3)), "not how it is stored"
