"""What is kept between parts of a scoring run: bits on disk, the stopping rule, and errors that name the place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.score import Aggregator, ScoreConfig, WidthMetric
from compactlm_nemo.errors import CheckpointError, ConfigError, NumericsError
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.aggregators import state_of
from compactlm_nemo.importance.score_state import ScoreState
from compactlm_nemo.importance.scores import FILE, Scores, load_scores, save_scores
from tests.importance.test_activations import windows
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

CFG = ScoreConfig(samples=5, micro_batch=2, width=[WidthMetric.l2_mean, WidthMetric.mean_var])


def _resumed(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    dims, model = filled(root / "llama", mesh)

    def measure(running: ScoreState, parts: list[Tensor], path: Path) -> dict[str, Tensor]:
        for part in parts:
            running.add(collect(model.eval(), part, CFG, lambda n: None), len(part))
            running.save(path)
        return running.rankings(dims, CFG)

    parts = list(windows().split(2))
    for state in collect(model.eval(), parts[0], CFG, lambda n: None).values():
        for x in state:  # what a rank sends is no larger than what it holds
            assert x.untyped_storage().nbytes() == x.nbytes
    whole = measure(ScoreState(), parts, root / "whole")
    measure(ScoreState(), parts[:2], root / "stopped")
    resumed = measure(ScoreState.load(root / "stopped"), parts[2:], root / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (root / "whole").read_bytes() == (root / "stopped").read_bytes()

    with torch.no_grad():  # a neuron of layer 2: what comes before stays finite, all that comes after does not
        model[0].decoder.layers[2].mlp.linear_fc1.weight[3] = float("nan")
    spoilt = ScoreState()
    spoilt.add(collect(model, parts[0], CFG, lambda n: None), 2)
    with pytest.raises(NumericsError, match="layer 2 mlp activations are NaN or infinite"):
        spoilt.check_finite(dims)


def test_going_on_gives_the_same_bits_and_nan_is_named(tmp_path):
    save_tiny("llama", tmp_path / "llama")
    run_ranks(_resumed, 1, tmp_path, tmp_path)


def test_it_stops_when_no_rank_moves(tmp_path):
    cfg = ScoreConfig(samples=5, stop_tolerance=0.1, stop_checks=2)
    running = ScoreState(samples=1, states={("depth.0", Aggregator.mean): state_of(torch.ones(1, 1))})
    ranks, moved = torch.arange(10.0), torch.arange(10.0)
    moved[[0, 9]] = moved[[9, 0]]
    first, second = {"l2_mean.hidden": ranks, "depth.bi": ranks}, {"l2_mean.hidden": moved, "depth.bi": ranks}
    assert not running.has_converged({}, first, cfg)  # nothing to compare with
    assert not running.has_converged(first, first, cfg)
    running.save(tmp_path / "state")
    running = ScoreState.load(tmp_path / "state")  # the count survives a kill
    assert running.has_converged(first, first, cfg)
    assert not running.has_converged(first, second, cfg) and running.settled_checks == 0
    assert not running.has_converged(first, first, ScoreConfig(stop_tolerance=None))


def test_scores_file_names_its_metrics(tmp_path):
    tensors = {
        "taylor.hidden": torch.ones(3), "l2_mean.hidden": torch.arange(3.0), "l2_mean.layers.0.mlp": torch.ones(2),
        "depth.bi_blocks": torch.ones(2, 2), "depth.lm_loss": torch.tensor([0.5, 0.25]),
    }  # fmt: skip
    metadata = {"model": "m", "width": "taylor,l2_mean"}
    save_scores(tmp_path / FILE, Scores(tensors, metadata))
    scores = load_scores(tmp_path)
    assert scores.metadata == metadata
    assert Scores(tensors, {}).width_metrics == ["l2_mean", "taylor"]
    assert scores.width_metrics == ["taylor", "l2_mean"] and scores.depth_metrics == ["bi_blocks", "lm_loss"]
    ranking = scores.ranking(WidthMetric.l2_mean, None)
    assert sorted(ranking) == ["depth", "hidden", "layers.0.mlp"]
    assert ranking["depth"].shape == (2, 2) and ranking["hidden"].tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"search.width=var_var is not in the scores.*add it to score.width"):
        scores.ranking(WidthMetric.var_var, None)
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_scores(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_scores(tmp_path / "absent")
