"""Leaving layers out, against transformers' model with a shorter list of layers in float64, in every layout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from compactlm_nemo.errors import ConfigError, NumericsError
from compactlm_nemo.importance.depth import LayerSums, layer_sums, lm_loss_rise, logit_mse, logit_mse_iterative
from compactlm_nemo.losses.linear_ce import linear_ce
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.mesh import Mesh
from tests.importance.reference import logits_without
from tests.importance.test_block_importance import block_reference, check_blocks, windows
from tests.support.meshes import COMBINED, EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of, whole_logits
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

LAYERS = 4
ROUNDS = 3
CASES = ("llama", "nemotron", "mixtral")
MISSING = [layers for n in range(LAYERS) for layers in combinations(range(LAYERS), n)]
"""Layers that can be left out together, in ascending order; none first."""
Want = dict[str, dict[tuple[int, ...], float]]


def loss_of(logits_BSV: Tensor, ids_BS: Tensor) -> float:
    """Mean over the predicted tokens, one by one."""
    num, length = ids_BS.shape
    losses = [
        math.log(sum(math.exp(x) for x in logits_BSV[b, s].tolist())) - float(logits_BSV[b, s, ids_BS[b, s + 1]])
        for b in range(num)
        for s in range(length - 1)
    ]
    return sum(losses) / len(losses)


def reference(model: Any) -> Want:
    """Loss, and error of the logits, without each set of layers."""
    logits = dict(logits_without(model, windows(), MISSING))
    whole = logits[()]
    return {
        "loss": {missing: loss_of(x, windows()) for missing, x in logits.items()},
        "error": {missing: float(((whole - x) ** 2).sum() / (whole**2).sum()) for missing, x in logits.items()},
    }


def with_layer(layers: Iterable[int], layer: int) -> tuple[int, ...]:
    return tuple(sorted([*layers, layer]))


def brute_force(error: dict[tuple[int, ...], float]) -> tuple[list[tuple[int, float]], list[int]]:
    """Layers in order of removal with their errors, and all layers in order of importance."""
    gone: list[tuple[int, float]] = []
    for _ in range(ROUNDS):
        missing = [layer for layer, _ in gone]
        tried = sorted((error[with_layer(missing, j)], j) for j in range(LAYERS) if j not in missing)
        gone.append((tried[0][1], tried[0][0]))
    return gone, [layer for layer, _ in gone] + [layer for _, layer in tried[1:]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("depth")
    for case in CASES:
        model = save_tiny(case, root / case).double()
        torch.save(block_reference(model, windows()), root / case / "blocks.pt")
        torch.save(reference(model), root / case / "want.pt")
    return root


def measure(
    model: ModelChunks,
    dims: Dims,
    mesh: Mesh,
    windows_NS: Tensor,
    removed: frozenset[int],
    told: list[int],
    block: int = 1,
) -> LayerSums:
    """Both metrics, of the two halves of the windows."""

    def token_losses(hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
        return linear_ce(hidden_NH, model.head(), labels_N, torch.ones_like(labels_N))

    first, second = (
        layer_sums(
            model,
            part_NS,
            micro_batch=2,
            token_losses=token_losses,
            logits=True,
            removed=removed,
            block=block,
            progress=told.append,
        )
        for part_NS in windows_NS.tensor_split(2)
    )
    return first + second


def _matches(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        dims, model = filled(root / case, mesh)
        if mesh.is_last_stage:  # what stands in padding rows must not matter
            model.head_weight.data[max(VOCAB - mesh.tp_rank * len(model.head_weight), 0) :] = 3.0
        before = whole_logits(model.eval(), dims, mesh, windows())
        _check_rounds(model, dims, mesh, torch.load(root / case / "want.pt"))
        _check_block_losses(model, dims, mesh, torch.load(root / case / "want.pt")["loss"])
        check_blocks(model, dims, mesh, torch.load(root / case / "blocks.pt"))
        after = whole_logits(model, dims, mesh, windows())  # the model is as it was
        assert (before is None and after is None) or torch.equal(before, after)


def _check_block_losses(model: ModelChunks, dims: Dims, mesh: Mesh, loss: dict[tuple[int, ...], float]) -> None:
    """Without two and three layers side by side; where no block begins there is no number."""
    for block in (2, 3):
        rise = lm_loss_rise(measure(model, dims, mesh, windows(), frozenset(), [], block=block))
        firsts = range(LAYERS - block + 1)
        want = torch.tensor([loss[tuple(range(j, j + block))] - loss[()] for j in firsts], dtype=torch.float64)
        torch.testing.assert_close(rise[: len(firsts)].cpu(), want, rtol=1e-4, atol=1e-4)
        assert bool(rise[len(firsts) :].isnan().all())


def _check_rounds(model: ModelChunks, dims: Dims, mesh: Mesh, want: Want) -> None:
    ran = [0]  # counted by the layers themselves
    handles = [layer.register_forward_hook(lambda *_: ran.append(ran.pop() + 1)) for layer in model.layers()]

    def one_round(removed: frozenset[int]) -> Tensor:
        told: list[int] = []
        ran[0] = 0
        got = measure(model, dims, mesh, windows(), removed, told)
        assert sum(told) == 5 and got.tokens == 5 * 11
        _check_values(got, want, removed)
        total = torch.tensor(ran[0])
        dist.all_reduce(total, group=mesh.pp_group)
        assert int(total) == got.layers_run == _passes(removed) * len(told)
        return logit_mse(got)

    one_round(frozenset({0, 2}))  # layers between and behind removed ones
    values, order = logit_mse_iterative(one_round, ROUNDS)
    for handle in handles:
        handle.remove()
    gone, ranked = brute_force(want["error"])
    assert [layer for layer, _ in order] == [layer for layer, _ in gone]
    assert [s for _, s in order] == pytest.approx([s for _, s in gone], rel=1e-5)
    assert values.argsort().tolist() == ranked


def _check_values(got: LayerSums, want: Want, removed: frozenset[int]) -> None:
    rise, error = lm_loss_rise(got), logit_mse(got)
    assert rise[sorted(removed)].isnan().all() and error[sorted(removed)].isnan().all()
    for j in set(range(LAYERS)) - removed:
        missing = with_layer(removed, j)
        # A difference of losses of about 5 nats, each in float32.
        wanted = want["loss"][missing] - want["loss"][tuple(sorted(removed))]
        assert float(rise[j]) == pytest.approx(wanted, rel=1e-5, abs=2e-6)
        assert float(error[j]) == pytest.approx(want["error"][missing], rel=1e-5)


def _passes(removed: frozenset[int]) -> int:
    """Layer passes of a batch: a run without layer j needs the later layers that are left."""
    later = [sum(i not in removed for i in range(j + 1, LAYERS)) for j in range(LAYERS)]
    return LAYERS + (later[min(removed)] if removed else 0) + sum(later[j] for j in range(LAYERS) if j not in removed)


def test_four_layers_take_ten_passes_and_not_sixteen():
    assert _passes(frozenset()) == 4 + 3 + 2 + 1
    assert _passes(frozenset({1})) == 4 + 2 + 2 + 1 + 0


@pytest.mark.proves("axes", "layers", CASES, "scored")
@pytest.mark.parametrize("layout", COMBINED)
def test_metrics_are_the_definition_in_every_layout(layout, root, tmp_path):
    run_ranks(_matches, LAYOUTS[layout][0], tmp_path, LAYOUTS[layout][1], ("llama", "nemotron"), root)


@pytest.mark.parametrize("layout", ["ep2_dp4", "ep2_pp2"])
def test_metrics_with_experts_are_the_definition(layout, root, tmp_path):
    run_ranks(_matches, EXPERT_LAYOUTS[layout][0], tmp_path, EXPERT_LAYOUTS[layout][1], ("mixtral",), root)


def rounds(*errors: list[float]) -> Any:
    """A measurement that gives these, round after round."""
    given = iter(errors)
    return lambda removed: torch.tensor(next(given), dtype=torch.float64)


def test_iterative_values_sort_into_the_order_of_removal_where_errors_fall_or_tie():
    nan = math.nan
    values, order = logit_mse_iterative(
        rounds([0.5, 0.2, 0.9, 0.2], [0.3, nan, 0.8, 0.1], [0.15, nan, 0.15, nan]), iterations=3
    )
    assert order == [(1, 0.2), (3, 0.1), (0, 0.15)]
    assert values.argsort().tolist() == [1, 3, 0, 2]
    assert values.dtype == torch.float32 and len(set(values.tolist())) == 4
    torch.testing.assert_close(values, torch.full((4,), 0.2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("iterations", [0, 4])
def test_a_model_keeps_at_least_one_layer(iterations):
    with pytest.raises(ConfigError, match=r"score.iterations=\d must be in \[1, 3\] for 4 layers"):
        logit_mse_iterative(rounds([0.5, 0.2, 0.9, 0.2]), iterations)


def test_an_infinite_output_is_an_error_that_names_the_layer():
    sums = torch.ones(3, 3, dtype=torch.float64)
    sums[1, 0] = sums[1, 1] = math.inf
    measured = LayerSums(sums=sums, tokens=3, layers_run=3, removed=frozenset())
    for metric in (lm_loss_rise, logit_mse):
        with pytest.raises(NumericsError, match="without layer 1 are NaN or infinite"):
            metric(measured)
