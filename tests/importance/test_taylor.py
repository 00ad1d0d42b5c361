"""Taylor importance in every layout against the definition: transformers' models and autograd in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compactlm_nemo.errors import NumericsError
from compactlm_nemo.importance.taylor import Gradients, LossSum, taylor_scores
from compactlm_nemo.losses.linear_ce import linear_ce_sum
from compactlm_nemo.losses.vocabulary import Head
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.optimizer import wrap_data_parallel
from tests.importance.reference import taylor_reference
from tests.support.meshes import COMBINED, EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

DENSE = ("llama", "llama_tied_llama3_rope", "nemotron", "nemotron_tied_biases", "llama_biases")
MIXED = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v2_tied_greedy")


def windows() -> Tensor:
    """Five samples: neither two data-parallel ranks nor micro-batches of two come out even."""
    return torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("taylor")
    for case in DENSE + MIXED:
        torch.save(taylor_reference(save_tiny(case, root / case).double(), windows()), root / case / "taylor.pt")
    return root


def loss_sum_of(chunks: ModelChunks, dims: Dims, mesh: Mesh, chunk_tokens: int = 7) -> LossSum:
    """Cross-entropy of a model's own output layer."""

    def loss_sum(hidden_NH: Tensor, labels_N: Tensor, mask_N: Tensor) -> Tensor:
        head = Head.on_mesh(chunks.head_weight, mesh, vocab_size=dims.vocab_size, chunk_tokens=chunk_tokens)
        return linear_ce_sum(hidden_NH, head, labels_N, mask_N)

    return loss_sum


def _matches(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        dims, chunks = filled(root / case, mesh)
        ddps = wrap_data_parallel(chunks.train(), shard_gradients=False)
        loss_sum = loss_sum_of(chunks, dims, mesh)
        done: list[int] = []
        for micro_batch in (3, 2):  # twice: the second must not see anything of the first
            gradients = Gradients(ddps, loss_sum, micro_batch)
            for part_NS in windows().split([2, 3]):
                gradients.add(part_NS, done.append)
                again = Gradients(ddps, loss_sum, micro_batch)
                again.load_state(gradients.state())
                gradients = again  # as after a restart
            got = taylor_scores(gradients)
        assert sum(done) == (10 if mesh.is_last_stage else 0)
        if rank > 0:
            assert not got
            continue
        want = torch.load(root / case / "taylor.pt")
        assert got.keys() == want.keys()
        for name, expected in want.items():
            assert got[name].dtype == torch.float32
            error = float((got[name].double() - expected).abs().max() / expected.max())
            assert got[name].shape == expected.shape and error < 1e-5, f"{case} {name}: off by {error}"


@pytest.mark.parametrize("layout", COMBINED)
def test_taylor_is_the_definition_in_every_layout(layout: str, root: Path, tmp_path: Path) -> None:
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, DENSE, root)


@pytest.mark.proves("layouts", "{layout}", MIXED, "gradients")
@pytest.mark.parametrize("layout", ["1", "tp2_sp", "cp2", *EXPERT_LAYOUTS])
def test_taylor_with_experts_is_the_definition(layout: str, root: Path, tmp_path: Path) -> None:
    ranks, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_matches, ranks, tmp_path, fields, MIXED, root)


def _is_refused(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of(pp=2)
    dims, chunks = filled(root / "llama", mesh)
    ddps = wrap_data_parallel(chunks, shard_gradients=False)
    with pytest.raises(NumericsError, match="taylor .* is NaN or infinite"):
        gradients = Gradients(ddps, lambda hidden, *_: hidden.sum() * torch.nan, micro_batch=2)
        gradients.add(windows(), lambda samples: None)
        taylor_scores(gradients)


def test_a_gradient_that_is_not_finite_is_an_error_on_every_rank(root: Path, tmp_path: Path) -> None:
    run_ranks(_is_refused, 2, tmp_path, root)
