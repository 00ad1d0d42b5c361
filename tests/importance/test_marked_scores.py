"""Every statistic of scoring over windows of which few places count, against the counted rows in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.score import ScoreConfig, WidthMetric
from compactlm_nemo.data.marks import mark
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.block_importance import block_importance, state_cosines
from compactlm_nemo.importance.depth import layer_sums, lm_loss_rise, logit_mse
from compactlm_nemo.importance.moments import MomentCollector, MomentSource, save_moments
from compactlm_nemo.importance.score_state import ScoreState
from compactlm_nemo.importance.taylor import Gradients, taylor_scores
from compactlm_nemo.losses.linear_ce import linear_ce
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.training.optimizer import wrap_data_parallel
from tests.importance.reference import PAIRS, activations, logits_without, over, over_routed, taylor_reference
from tests.importance.test_activations import assert_scores, windows
from tests.importance.test_taylor import loss_sum_of
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

CASES = ("llama", "nemotron")
EXPERTS = ("qwen2_moe",)
COUNTED = [[0, 1, 2, 6], [3, 4, 5, 6, 7, 8], [11, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [9, 10]]
"""Of each of five windows of 12; under context parallelism the first rank has 0-2 and 9-11: none of the second."""


def counts() -> Tensor:
    counts_NS = torch.zeros(5, 12, dtype=torch.bool)
    for row, places in zip(counts_NS, COUNTED, strict=True):
        row[places] = True
    return counts_NS


def marked() -> Tensor:
    return mark(windows(), counts())


def ragged(x_NSE: Tensor, batch: str, sequence: str) -> Tensor:
    """Aggregate each sample over its places that count, then the samples."""
    return over(torch.stack([over(x[rows], sequence, 0) for x, rows in zip(x_NSE, counts(), strict=True)]), batch, 0)


def cosine_gap(before_NSH: Tensor, after_NSH: Tensor) -> float:
    dots = (before_NSH * after_NSH).sum(-1)
    return float(1 - (dots / (before_NSH.pow(2).sum(-1) * after_NSH.pow(2).sum(-1)).sqrt())[counts()].mean())


def reference(model: Any) -> dict[str, Any]:
    model = model.double()
    seen = activations(model, windows())
    num_layers = len(model.model.layers)
    scores = {"depth.bi": torch.tensor([cosine_gap(*pair) for pair in seen["depth"]], dtype=torch.float64)}
    for batch, sequence in PAIRS:
        scores |= {
            f"{batch}_{sequence}.{name}": sum((ragged(x, batch, sequence) for x in values), torch.zeros(()))
            for name, values in seen.items()
            if name != "depth"
        }
    scores |= {f"reap.{name}": over_routed(x[0], counts()) for name, x in seen.items() if name.endswith(".experts")}
    inputs = {name: values[0] for name, values in seen.items() if name.endswith(".mlp")}
    for i in range(num_layers):
        inputs[f"layers.{i}.attention_norm"], inputs[f"layers.{i}.mlp_norm"] = seen["hidden"][2 * i : 2 * i + 2]
    inputs["final_norm"] = seen["hidden"][-1]
    states = [before for before, _ in seen["depth"]] + [seen["depth"][-1][1]]
    blocks = torch.full((num_layers, num_layers), torch.nan, dtype=torch.float64)
    for i in range(num_layers):
        for n in range(1, num_layers - i + 1):
            blocks[i, n - 1] = cosine_gap(states[i], states[i + n])
    logits = dict(logits_without(model, windows(), [(), *((j,) for j in range(num_layers))]))
    rows = counts()[:, :-1]
    losses = [
        torch.nn.functional.cross_entropy(x[:, :-1][rows], windows()[:, 1:][rows]).item() for x in logits.values()
    ]
    whole = logits[()][counts()]
    errors = [float(((whole - x[counts()]) ** 2).sum() / (whole**2).sum()) for name, x in logits.items() if name]
    return {
        "scores": scores,
        "moments": {name: x[counts()].T @ x[counts()] for name, x in inputs.items()},
        "blocks": blocks,
        "lm_loss": torch.tensor(losses[1:], dtype=torch.float64) - losses[0],
        "logit_mse": torch.tensor(errors, dtype=torch.float64),
        "taylor": taylor_reference(model, windows(), counts()),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("marked_scores")
    for case in CASES + EXPERTS:
        torch.save(reference(save_tiny(case, root / case)), root / case / "want.pt")
    return root


def _near(got: Tensor, want: Tensor, label: str, rtol: float = 1e-5) -> None:
    largest = float(want.nan_to_num().abs().max())
    torch.testing.assert_close(
        got.double(), want, rtol=rtol, atol=rtol * largest, equal_nan=True, msg=lambda m: f"{label}: {m}"
    )


def _depth(model: ModelChunks) -> tuple[Tensor, Tensor]:
    def token_losses(hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
        return linear_ce(hidden_NH, model.head(), labels_N, torch.ones_like(labels_N))

    first, second = (
        layer_sums(model, part_NS, micro_batch=2, token_losses=token_losses, logits=True, progress=lambda samples: None)
        for part_NS in marked().split([3, 2])
    )
    return lm_loss_rise(first + second), logit_mse(first + second)


def _matches(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path, out: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        dims, model = filled(root / case, mesh)
        want = torch.load(root / case / "want.pt")
        cfg = ScoreConfig(samples=5, micro_batch=2, width=[metric for metric in WidthMetric if metric.pair])
        moments, running = MomentCollector(model.eval(), experts=True), ScoreState()
        for part_NS in marked().split([3, 2]):
            running.add(collect(model, part_NS, cfg, lambda samples: None, moments.on_batch), len(part_NS))
        save_moments(out / case, moments.reduce(), mesh, tokens=sum(map(len, COUNTED)))
        if rank == 0:
            assert_scores(running.rankings(dims, cfg), want["scores"], case)
        cosines = sum(
            state_cosines(model, part_NS, micro_batch=2, progress=lambda samples: None)
            for part_NS in marked().split([3, 2])
        )
        _near(block_importance(cosines, sum(map(len, COUNTED))), want["blocks"], f"{case} blocks")
        rise, error = _depth(model)
        _near(rise, want["lm_loss"], f"{case} lm_loss", 1e-4)
        _near(error, want["logit_mse"], f"{case} logit_mse")
        ddps = wrap_data_parallel(model.train(), shard_gradients=False)
        gradients = Gradients(ddps, loss_sum_of(model, dims, mesh), 2)
        for part_NS in marked().split([2, 3]):
            gradients.add(part_NS, lambda samples: None)
        for name, got in taylor_scores(gradients).items():
            _near(got, want["taylor"][name], f"{case} taylor {name}")


def _check_moments(cases: tuple[str, ...], root: Path, saved: Path) -> None:
    for case in cases:
        source = MomentSource(saved / case)
        for name, want in torch.load(root / case / "want.pt")["moments"].items():
            _near(source.whole(name), want, f"{case} {name}")


@pytest.mark.parametrize("layout", ["1", "dp2", "tp2_sp", "pp2", "vpp2", "cp2", "tp2_sp_cp2"])
def test_scores_are_of_the_places_that_count_in_every_layout(layout, root, tmp_path):
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, CASES, root, tmp_path)
    _check_moments(CASES, root, tmp_path)


@pytest.mark.parametrize("layout", ["1", "cp2", *EXPERT_LAYOUTS])
def test_scores_of_experts_are_of_the_places_that_count(layout, root, tmp_path):
    ranks, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_matches, ranks, tmp_path, fields, EXPERTS, root, tmp_path)
    _check_moments(EXPERTS, root, tmp_path)
