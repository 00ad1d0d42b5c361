"""Drawn tokens against the definition of the nucleus, by numpy."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from compactlm_nemo.losses.sampling import Sampler
from compactlm_nemo.losses.vocabulary import Head, VocabShard
from tests.support.meshes import mesh_of
from tests.support.ranks import run_ranks

VOCAB, WIDTH = 700, 5
NEVER, ENDS = [3, 300, 699], [11]
DRAWS = 20_000


def nucleus(logits: numpy.ndarray, temperature: float, top_p: float, never: list[int]) -> numpy.ndarray:
    """Probabilities of the smallest leading set with at least `top_p`, by falling probability and rising id."""
    z = logits.astype(numpy.float64) / temperature
    z[never] = -numpy.inf
    p = numpy.exp(z - z.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += p[i]
        if mass >= top_p:
            break
    q = numpy.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q


def _head(shard: VocabShard | None = None, dtype: torch.dtype = torch.float32) -> tuple[Head, Tensor]:
    generator = torch.Generator().manual_seed(4)
    weight_VH = torch.randn(VOCAB, WIDTH, generator=generator).mul(1.5).to(dtype)
    weight_VH[20:40] = weight_VH[0]  # equal logits
    hidden_1H = torch.randn(1, WIDTH, generator=generator).to(dtype)
    return Head(weight_VH, shard or VocabShard(VOCAB), DRAWS), hidden_1H


def _uniforms(seed: int = 0):  # type: ignore[no-untyped-def]
    @cache
    def table(attempt: int) -> Tensor:
        return torch.from_numpy(numpy.random.default_rng([seed, attempt]).random(DRAWS))

    def uniforms(numbers_N: Tensor, attempt: int) -> Tensor:
        return table(attempt)[numbers_N]

    return uniforms


def _drawn(head: Head, hidden_1H: Tensor, temperature: float, top_p: float, first: bool = False) -> Tensor:
    sampler = Sampler(temperature=temperature, top_p=top_p, never=torch.tensor(NEVER))
    is_first_N = torch.full((DRAWS,), first)
    return sampler.ids(head, hidden_1H.expand(DRAWS, -1), _uniforms(), torch.tensor(ENDS), is_first_N)


@pytest.mark.parametrize(
    ("temperature", "top_p", "first"), [(1.0, 0.98, False), (0.7, 0.5, False), (2.0, 1.0, True), (0.5, 0.05, True)]
)
def test_tokens_are_drawn_as_the_nucleus_says(temperature: float, top_p: float, first: bool) -> None:
    head, hidden_1H = _head()
    logits = (hidden_1H.double() @ head.weight_VH.double().T)[0].numpy()
    q = nucleus(logits, temperature, top_p, NEVER + ENDS * first)
    counts = numpy.bincount(_drawn(head, hidden_1H, temperature, top_p, first).numpy(), minlength=VOCAB)
    assert counts[q == 0].sum() == 0
    often = q * DRAWS >= 5
    chi = ((counts - q * DRAWS)[often] ** 2 / (q * DRAWS)[often]).sum()
    rest = often.sum() + 1
    assert abs(chi - rest) < 5 * numpy.sqrt(2 * rest) + 5, (chi, rest)


def test_of_equal_probabilities_the_lower_ids_belong_to_the_nucleus() -> None:
    head = Head(torch.zeros(VOCAB, WIDTH), VocabShard(VOCAB), DRAWS)
    ids_N = _drawn(head, torch.ones(1, WIDTH), 1.0, 400.5 / (VOCAB - len(NEVER)))
    assert set(ids_N.tolist()) == set(range(403)) - set(NEVER)


def _on_ranks(rank: int, world: int, path: Path) -> None:
    mesh = mesh_of(tp=world)
    head, hidden_1H = _head()
    padded_VH = torch.cat([head.weight_VH, head.weight_VH.new_zeros(800 - VOCAB, WIDTH)])
    shard_VH = padded_VH.chunk(world)[rank]
    shard = VocabShard(VOCAB, rank * len(shard_VH), mesh.tp_group)
    drawn_N = _drawn(Head(shard_VH, shard, 6400), hidden_1H, 0.9, 0.9)
    assert torch.equal(drawn_N, torch.load(path))


def test_ranks_of_a_vocabulary_draw_the_same(tmp_path: Path) -> None:
    head, hidden_1H = _head()
    torch.save(_drawn(head, hidden_1H, 0.9, 0.9), tmp_path / "drawn.pt")
    run_ranks(_on_ranks, 2, tmp_path, tmp_path / "drawn.pt")
