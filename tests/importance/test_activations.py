"""Collected scores against hooks on transformers' model in float64; every layout gives the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.score import Neurons, ScoreConfig, WidthMetric
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.score_state import ScoreState
from tests.importance.reference import reference
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import CASES, EXPERT_CASES, LATENT_CASES, VOCAB, save_tiny

DENSE = ("llama", "nemotron")


MIXED = ("mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3")


FOUR_GROUPS = tuple(f"{case}_4_groups" for case in DENSE)
"""The dense cases with four query groups of two heads: one a rank of TP 4."""


PAIRS = [metric for metric in WidthMetric if metric.pair]


def windows() -> Tensor:
    """Five samples: neither two data-parallel ranks nor micro-batches of two come out even."""
    return torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("score")
    for name in (*CASES, *FOUR_GROUPS):
        changes = {"num_attention_heads": 8, "num_key_value_heads": 4} if name in FOUR_GROUPS else {}
        model = save_tiny(name.removesuffix("_4_groups"), root / name, **changes)
        for neurons in Neurons:
            torch.save(reference(model, windows(), neurons.name), root / name / f"{neurons.name}.pt")
    return root


def assert_scores(
    got: dict[str, Tensor], want: dict[str, Tensor], label: str, rounding: dict[str, float] | None = None
) -> None:
    """The same names, values to 1e-5 and order; `want` is float64.

    `rounding` is what the definition itself is off by in float32, as a share of the largest score of the axis: where
    twice that is more than 1e-5, it is allowed.
    """
    assert got.keys() == want.keys(), label
    for name, expected in want.items():
        assert got[name].dtype == torch.float32
        # Of the largest score of its axis: only differences between scores matter.
        atol = max(1e-5, 2 * (rounding or {}).get(name, 0)) * float(expected.abs().max())
        torch.testing.assert_close(
            got[name].double(), expected, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{label} {n}: {m}"
        )
        order = expected.sort(stable=True)
        apart = order.values.diff() > 4 * atol
        same = got[name][order.indices].diff() > 0
        assert bool((same | ~apart).all()), f"{label} {name}: another order"


def _matches(rank: int, world: int, layout: dict, cases: tuple[str, ...], root: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        dims, model = filled(root / case, mesh)
        for neurons in Neurons if case in (*DENSE, *MIXED, *FOUR_GROUPS) else [Neurons.after]:
            cfg = ScoreConfig(samples=5, micro_batch=2, width=PAIRS, neurons=neurons)
            done: list[int] = []
            running = ScoreState()
            for part in windows().split([3, 2]):
                running.add(collect(model.eval(), part, cfg, done.append), len(part))
            assert rank or mesh.pp_size > 1 or sum(done) == 5
            if rank == 0:
                want = torch.load(root / case / f"{neurons.name}.pt")
                assert_scores(running.rankings(dims, cfg), want, f"{case} {neurons.name}")


@pytest.mark.proves("axes", ["hidden", "ffn", "heads", "groups"], CASES, "scored")
@pytest.mark.proves("axes", "experts", (*EXPERT_CASES, *LATENT_CASES), "scored")
@pytest.mark.proves("axes", "shared_expert_ffn", LATENT_CASES, "scored")
def test_scores_of_every_family_are_the_definition(root, tmp_path):
    run_ranks(_matches, 1, tmp_path, {}, tuple(CASES), root)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1"])
def test_dense_scores_are_the_definition_in_every_layout(layout, root, tmp_path):
    run_ranks(_matches, LAYOUTS[layout][0], tmp_path, LAYOUTS[layout][1], DENSE, root)


def test_dense_scores_over_four_tensor_parallel_ranks_are_the_definition(root, tmp_path):
    run_ranks(_matches, 4, tmp_path, {"tp": 4}, FOUR_GROUPS, root)


@pytest.mark.parametrize("layout", ["dp2", "tp2_sp", "pp2", "cp2", *EXPERT_LAYOUTS])
def test_moe_scores_are_the_definition_in_every_layout(layout, root, tmp_path):
    world, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_matches, world, tmp_path, fields, MIXED, root)
