"""Scores, second moments, losses, cuts that run the model, and timing, at full width on the device.

Whatever runs over calibration samples must not wait for the device once a batch: the host would prepare the next batch
after this one, not beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compactlm_nemo.config.score import DepthMetric, Neurons, ScoreConfig, WidthMetric
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.block_importance import state_cosines
from compactlm_nemo.importance.depth import layer_sums
from compactlm_nemo.importance.moments import MomentCollector
from compactlm_nemo.importance.taylor import Gradients, taylor_scores
from compactlm_nemo.losses.linear_ce import linear_ce, linear_ce_sum
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.pruning.block_replacement import measure_replacements
from compactlm_nemo.search.timing import time_parts
from compactlm_nemo.training.optimizer import wrap_data_parallel
from tests.fakecuda.cluster import cluster, skip_without_fake_cuda
from tests.fakecuda.counts import Place
from tests.fakecuda.experiment import model_of, shapes

skip_without_fake_cuda()

LENGTH = 256
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"world": 4},
    "tp4_sp": {"world": 4, "tp": 4, "sequence_parallel": True},
    "pp2_last": {"world": 4, "pp": 2, "rank": 3},
    "vpp2_last": {"world": 2, "pp": 2, "virtual_stages": 2, "rank": 1},
    "cp2": {"world": 4, "cp": 2},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"world": 4, "ep": 2},
    "tp2_sp_ep2": {"world": 4, "tp": 2, "sequence_parallel": True, "ep": 2},
}
EXPERTS = {
    "family": "qwen2_moe", "num_experts": 4, "experts_per_token": 2, "ffn_hidden_size": 512, "shared_expert_ffn": 512,
}  # fmt: skip
NARROW = {"ffn_hidden_size": 1024}
"""Second moments come back to the host in float64, of every layer."""

Measure = Callable[[ModelChunks, torch.Tensor], Any]


def nothing(samples: int) -> None: ...


def activations(neurons: Neurons) -> Measure:
    width = [metric for metric in WidthMetric if metric.pair]
    cfg = ScoreConfig(samples=64, micro_batch=1, width=width, depth=[DepthMetric.bi], neurons=neurons)
    return lambda model, windows_NS: collect(model, windows_NS, cfg, nothing)


def moments(experts: bool = False) -> Measure:
    def measure(model: ModelChunks, windows_NS: torch.Tensor) -> None:
        moments = MomentCollector(model, experts=experts)
        cfg = ScoreConfig(samples=64, micro_batch=1)
        collect(model, windows_NS, cfg, nothing, moments.on_batch)
        moments.reduce()

    return measure


def leave_one_out(block: int) -> Measure:
    def measure(model: ModelChunks, windows_NS: torch.Tensor) -> None:
        def losses(hidden_NH: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
            return linear_ce(hidden_NH, model.head(), labels_N, torch.ones_like(labels_N, dtype=torch.float32))

        layer_sums(
            model, windows_NS, micro_batch=1, token_losses=losses, logits=block == 1, block=block, progress=nothing
        )

    return measure


def taylor(model: ModelChunks, windows_NS: torch.Tensor) -> None:
    def loss_sum(hidden_NH: torch.Tensor, labels_N: torch.Tensor, mask_N: torch.Tensor) -> torch.Tensor:
        return linear_ce_sum(hidden_NH, model.head(), labels_N, mask_N)

    gradients = Gradients(wrap_data_parallel(model, shard_gradients=False), loss_sum, micro_batch=1)
    gradients.add(windows_NS, nothing)
    taylor_scores(gradients)


def replacements(model: ModelChunks, windows_NS: torch.Tensor) -> None:
    measure_replacements(model, windows_NS, [(1, model.dims.num_layers)], micro_batch=1, progress=nothing)


MEASURES: dict[str, Measure] = {
    "activations": activations(Neurons.after),
    "neurons_before": activations(Neurons.before),
    "moments": moments(),
    "block_importance": lambda model, windows: state_cosines(model, windows, micro_batch=1, progress=nothing),
    "leave_one_out": leave_one_out(1),
    "blocks_left_out": leave_one_out(2),
    "taylor": taylor,
    "lm_loss": lambda model, windows: evaluate_lm_loss(
        model, torch.cat([windows, windows[:, :1]], dim=1), micro_batch=1, progress=nothing
    ),
    "replacements": replacements,
}


def waits(measure: Measure, layout: dict[str, Any], batches: int, **dims: Any) -> Counter[Place]:
    """Return where a measurement over so many batches a rank waits."""
    with cluster(**layout) as there:
        model = model_of(shapes(there.mesh, layers=2, **(dims or NARROW))[0], there.mesh).eval()
        windows_NS = torch.zeros(batches * there.mesh.dp_size, LENGTH, dtype=torch.long).cuda()
        there.counts.clear()
        measure(model, windows_NS)
        assert "math" not in there.counts.attention
        return there.counts.waits


@pytest.mark.parametrize("name", MEASURES)
def test_a_measurement_waits_no_more_for_more_batches(name: str) -> None:
    few, many = (waits(MEASURES[name], LAYOUTS["tp1"], batches) for batches in (2, 4))
    assert few == many


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
@pytest.mark.parametrize("name", MEASURES)
def test_a_measurement_runs_on_the_device(name: str, layout: str) -> None:
    waits(MEASURES[name], LAYOUTS[layout], 2)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("name", ["activations", "neurons_before", "moments", "taylor", "block_importance"])
def test_experts_are_measured_on_the_device(name: str, layout: str) -> None:
    measure = moments(experts=True) if name == "moments" else MEASURES[name]
    waits(measure, EXPERT_LAYOUTS[layout], 2, **EXPERTS)


@pytest.mark.parametrize("layout", ["tp1", "tp4_sp"])
def test_timing_waits_for_the_device_once(layout: str) -> None:
    with cluster(**LAYOUTS[layout]) as there:
        model = model_of(shapes(there.mesh, layers=1)[0], there.mesh)
        tokens_BS = torch.zeros(1, LENGTH, dtype=torch.long).cuda()
        there.counts.clear()
        ms = time_parts(model, tokens_BS, with_output=there.mesh.is_last_stage)
    assert there.counts.waits.total() == 1
    assert ms["attention"] > 0
