"""Collected scores against hooks on transformers' model in float64; every layout gives the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.schema import Aggregator, ScoreConfig
from compactlm_nemo.importance.collect import collect_scores
from tests.megatron import filled, mesh_of
from tests.models.tiny import VOCAB, save_tiny
from tests.ranks import run_ranks

CASES = ("llama", "nemotron")
HEAD_DIM = 16
PAIRS = [("l2", "mean"), ("mean", "var")]
"""(batch, sequence) aggregators."""


def windows() -> Tensor:
    """Five samples: neither two data-parallel ranks nor micro-batches of two come out even."""
    return torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(8))


def _over(x: Tensor, how: str, dim: int) -> Tensor:
    if how == "mean":
        return x.abs().sum(dim) / x.shape[dim]
    if how == "l2":
        return (x * x).sum(dim) ** 0.5
    centred = x - x.sum(dim, keepdim=True) / x.shape[dim]
    return (centred * centred).sum(dim) / x.shape[dim]


def activations(model: Any) -> dict[str, list[Tensor]]:
    """`[N, S, E]` activations by the name of their score; `hidden` has one for each norm."""
    seen: dict[str, list[Tensor]] = {"hidden": []}

    def at(name: str, value: Any) -> None:
        seen.setdefault(name, []).append(value)

    def norm_output(module: Any, args: Any, out: Tensor) -> None:
        at("hidden", out)

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, i=i: at(f"layers.{i}.heads", args[0].unflatten(-1, (-1, HEAD_DIM)).pow(2).sum(-1).sqrt())
        )
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: at(f"layers.{i}.mlp", args[0]))
        layer.input_layernorm.register_forward_hook(norm_output)
        layer.post_attention_layernorm.register_forward_hook(norm_output)
        layer.register_forward_hook(
            lambda _, args, out: at("depth", torch.stack([args[0], out[0] if isinstance(out, tuple) else out]))
        )
    model.model.norm.register_forward_hook(norm_output)
    with torch.no_grad():
        model(windows())
    return seen


def scores_of(seen: dict[str, list[Tensor]], batch: str, sequence: str) -> dict[str, Tensor]:
    scores = {}
    for name, values in seen.items():
        if name == "depth":
            before, after = torch.stack(values, dim=1)  # [L, N, S, H] each
            dots = (before * after).sum(-1)
            cosines = dots / (before.pow(2).sum(-1).sqrt() * after.pow(2).sum(-1).sqrt())
            scores["depth.bi"] = 1 - cosines.mean(dim=(1, 2))
        else:
            scores[name] = sum(_over(_over(x, sequence, 1), batch, 0) for x in values)
    return scores


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("score")
    for case in CASES:
        seen = activations(save_tiny(case, root / case).double())
        torch.save({pair: scores_of(seen, *pair) for pair in PAIRS}, root / case / "scores.pt")
    return root


def _matches(rank: int, world: int, tp: int, pp: int, root: Path) -> None:
    mesh = mesh_of(tp, pp)
    for case in CASES:
        dims, model = filled(root / case, mesh)
        for pair, want in torch.load(root / case / "scores.pt").items():
            batch, sequence = (Aggregator[name] for name in pair)
            cfg = ScoreConfig(samples=5, micro_batch=2, batch_aggregator=batch, sequence_aggregator=sequence)
            done: list[int] = []
            got = collect_scores(model.eval(), dims, mesh, windows(), cfg, done.append)
            assert got.keys() == want.keys()
            for name, expected in want.items():
                assert got[name].dtype == torch.float32
                # Compared with the largest score of its axis: only differences between scores matter.
                atol = 1e-5 * float(expected.abs().max())
                torch.testing.assert_close(
                    got[name].double(),
                    expected,
                    rtol=1e-5,
                    atol=atol,
                    msg=lambda m, n=f"{case} {pair} {name}": f"{n}: {m}",
                )
            assert done


@pytest.mark.parametrize(("world", "tp", "pp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2)])
def test_scores_are_the_definition_in_every_layout(world, tp, pp, root, tmp_path):
    run_ranks(_matches, world, tmp_path, tp, pp, root)
