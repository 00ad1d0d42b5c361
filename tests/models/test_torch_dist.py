"""Checkpoints as NeMo 2 and Megatron-Bridge write them: saved by Megatron-Core itself, under their names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.checkpoint import CheckpointSource, sharding_metadata
from compactlm_nemo.models.families import EMBEDDING
from compactlm_nemo.models.hf import export_hf, open_hf
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

FUSED = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}


def _transformer_engine_name(name: str) -> str:
    for ours, fused in FUSED.items():
        name = name.replace(ours, fused)
    return name


def _save_as(rank: int, world: int, hf: Path, nemo: Path, bridge: Path) -> None:
    """Save a model as NeMo 2 and as Megatron-Bridge do."""
    mesh = mesh_of(world, 1)
    _, model = filled(hf, mesh, vocab_multiple=32)
    for folder, prefix in ((nemo / "weights", "module."), (bridge / "iter_0000007", "")):
        state = model[0].sharded_state_dict(metadata=sharding_metadata(mesh))
        for tensor in state.values():
            if hasattr(tensor, "key"):
                tensor.key = prefix + _transformer_engine_name(tensor.key)
        if rank == 0:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(state, str(folder))


@pytest.mark.proves("formats", "torch_dist in", "{case}", "equal")
@pytest.mark.parametrize("case", ["llama", "nemotron", "qwen3_tied", "qwen2_moe"])
def test_other_tools_checkpoints_are_the_same_model(case: str, tmp_path: Path) -> None:
    save_tiny(case, tmp_path / "hf")
    dims, _ = open_hf(tmp_path / "hf")
    run_ranks(_save_as, 2, tmp_path, tmp_path / "hf", tmp_path / "nemo", tmp_path / "bridge")
    want = load_file(tmp_path / "hf" / "model.safetensors")
    for tool in ("nemo", "bridge"):
        source = CheckpointSource(tmp_path / tool, dims)
        export_hf(tmp_path / "hf", tmp_path / f"from_{tool}", dims, source, torch.float32)
        got = load_file(tmp_path / f"from_{tool}" / "model.safetensors")
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "hf")
    dims, _ = open_hf(tmp_path / "hf")
    run_ranks(_save_as, 1, tmp_path, tmp_path / "hf", tmp_path / "nemo", tmp_path / "bridge")
    wide = dims.with_shape(layers=4, hidden=48, ffn=88, heads=4)
    deep = dims.with_shape(layers=5, hidden=48, ffn=80, heads=4)
    for other, words in ((wide, "by the config"), (deep, "has 4 layers")):
        with pytest.raises(CheckpointError, match=words):
            CheckpointSource(tmp_path / "nemo", other)
    shutil.rmtree(tmp_path / "nemo" / "weights")
    with pytest.raises(CheckpointError, match="holds no model"):
        CheckpointSource(tmp_path / "nemo", dims)


def _save_untied(rank: int, world: int, hf: Path, nemo: Path, off: float) -> None:
    mesh = mesh_of(world, 1)
    _, model = filled(hf, mesh, vocab_multiple=32)
    with torch.no_grad():
        model[0].output_layer.weight.copy_(model[0].embedding.word_embeddings.weight)
        model[0].output_layer.weight[100, 3] += off
        model[0].output_layer.weight[-1] += 1  # a row of the padding, which means nothing
    (nemo / "weights").mkdir(parents=True)
    dist_checkpointing.save(model[0].sharded_state_dict(metadata=sharding_metadata(mesh)), str(nemo / "weights"))


def test_a_config_that_ties_what_the_checkpoint_does_not_is_refused(tmp_path: Path) -> None:
    """The output layer would be dropped, and every logit be another's."""
    save_tiny("llama", tmp_path / "hf")
    dims = replace(open_hf(tmp_path / "hf")[0], tied_embeddings=True)
    for name, off in (("copy", 0.0), ("other", 1e-3)):
        (tmp_path / name).mkdir()
        run_ranks(_save_untied, 1, tmp_path / name, tmp_path / "hf", tmp_path / name, off)
    CheckpointSource(tmp_path / "copy", dims)(EMBEDDING)
    with pytest.raises(CheckpointError, match="an output layer that differs from its embedding"):
        CheckpointSource(tmp_path / "other", dims)(EMBEDDING)
