"""Gradients of all parameters of the dense families, on ranks that share a model, against transformers' autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.importance.taylor import Gradients
from compactlm_nemo.losses.linear_ce import linear_ce_sum
from compactlm_nemo.models.build import global_names, tp_share
from compactlm_nemo.models.families import OUTPUT_LAYER
from compactlm_nemo.models.hf import HFSource
from compactlm_nemo.training.optimizer import wrap_data_parallel
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS, VOCAB_MULTIPLE, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import CASES, EXPERT_CASES, LATENT_CASES, save_tiny, tokens

DENSE = [case for case in CASES if case not in (*EXPERT_CASES, *LATENT_CASES)]
"""Others with experts are in `tests/importance/test_taylor.py`."""
SHARED = {"tp2_sp_pp2": (4, {"tp": 2, "sequence_parallel": True, "pp": 2})} | LAYOUTS | EXPERT_LAYOUTS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case with the model and one with its gradients in place of the weights."""
    root = tmp_path_factory.mktemp("gradients")
    for case in (*DENSE, *LATENT_CASES):
        _save_with_gradients(case, root)
    return root


def _save_with_gradients(case: str, root: Path, **changes: Any) -> None:
    model = save_tiny(case, root / case, **changes).double()
    logits_BSV = model(tokens()).logits
    F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    for parameter in model.parameters():
        parameter.data = parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad
    model.save_pretrained(root / f"{case}_gradients")


def _match(rank: int, world: int, layout: dict[str, Any], cases: list[str], root: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        dims, chunks = filled(root / case, mesh)
        ddps = wrap_data_parallel(chunks.train(), shard_gradients=False)

        def loss_sum(hidden_NH: Tensor, labels_N: Tensor, mask_N: Tensor, chunks: Any = chunks) -> Tensor:
            return linear_ce_sum(hidden_NH, chunks.head(), labels_N, mask_N)

        gradients = Gradients(ddps, loss_sum, 1)
        gradients.add(tokens(), lambda samples: None)
        gradients.finish()
        source, padded = HFSource(root / f"{case}_gradients", dims), dims.padded_vocab(mesh.tp_size, VOCAB_MULTIPLE)
        for name, parameter in global_names(chunks):
            if name == OUTPUT_LAYER and dims.tied_embeddings:
                continue  # a copy of the embedding
            if not parameter.requires_grad:
                assert name.endswith("router.expert_bias")
                continue
            whole = source(name)
            want = tp_share(
                name, whole, rank=mesh.tp_rank, size=mesh.tp_size, gated=dims.gated_mlp, padded_vocab=padded
            )
            error = float((parameter.main_grad.double() - want).abs().max() / whole.abs().max())
            assert error < 1e-5, f"{case} {name}: off by {error}"


@pytest.mark.proves("layouts", "{layout}", DENSE, "gradients")
@pytest.mark.parametrize("layout", ["tp2_pp2", "tp2_sp_cp2"])
def test_gradients_of_every_dense_family_are_those_of_transformers(layout: str, root: Path, tmp_path: Path) -> None:
    ranks, fields = LAYOUTS[layout]
    run_ranks(_match, ranks, tmp_path, fields, DENSE, root)


@pytest.mark.proves("layouts", "{layout}", LATENT_CASES, "gradients")
@pytest.mark.parametrize("layout", ["tp2_sp_pp2", "tp2_sp_cp2", "ep2_pp2", "tp2_sp_ep2"])
def test_gradients_with_latents_are_those_of_transformers(layout: str, root: Path, tmp_path: Path) -> None:
    """Layers with experts need sequence parallelism beside tensor parallelism; `tp2` has the latents without it."""
    ranks, fields = SHARED[layout]
    run_ranks(_match, ranks, tmp_path, fields, list(LATENT_CASES), root)


def test_gradients_of_latents_without_sequence_parallelism(tmp_path: Path) -> None:
    """Of a model that has no experts: all its layers are dense."""
    made = {"first_k_dense_replace": 4}
    _save_with_gradients("deepseek_v3", tmp_path, **made)
    run_ranks(_match, 2, tmp_path, {"tp": 2}, ["deepseek_v3"], tmp_path)
