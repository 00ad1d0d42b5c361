"""This package's scoring, timed: the passes that `bench.importance` compares with the bare forward of the same model.

A pass is everything between the loaded model and the scores: hooks on, all batches, hooks off, states merged and
turned into the vectors of the scores file. Reading the teacher and writing files are not part of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from bench.common.teacher import PRECISIONS, add_run_arguments, calibration_tokens, our_model
from bench.common.worker import Pass, answers_only, serve
from bench.importance.agreement import UNNORMED
from bench.importance.one_axis import AXES, OneAxis
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.config.score import Aggregator, DepthMetric, ScoreConfig, WidthMetric
from compactlm_nemo.importance import activations
from compactlm_nemo.importance.moments import MomentCollector
from compactlm_nemo.importance.score_state import ScoreState
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.parallel.mesh import Mesh

DEFAULT = WidthMetric.l2_mean


PAIRS = [metric for metric in WidthMetric if metric.pair]


NO_WIDTH, NO_DEPTH = [WidthMetric.taylor], [DepthMetric.lm_loss]
"""A configuration names metrics of both; these are not measured in the forward pass, so nothing is hooked for them."""


METRICS: dict[str, tuple[list[WidthMetric], list[DepthMetric]]] = {
    "bi": (NO_WIDTH, [DepthMetric.bi]),
    "width l2_mean": ([DEFAULT], NO_DEPTH),
    "width l2_mean + bi": ([DEFAULT], [DepthMetric.bi]),
    "width nine pairs": (PAIRS, NO_DEPTH),
    "width nine pairs + bi": (PAIRS, [DepthMetric.bi]),
}
"""Pass -> what it measures."""


class Subject:
    """The teacher and the passes over it."""

    def __init__(self, mesh: Mesh, args: argparse.Namespace) -> None:
        self.mesh, self.micro_batch = mesh, args.micro_batch
        self.dims, self.chunks = our_model(mesh, PRECISIONS[args.precision])
        self.tokens = calibration_tokens(args)

    def passes(self) -> dict[str, Pass]:
        """All passes over all tokens, and `warm_up`: the first batch, forward only."""
        kinds: dict[str, Callable[..., dict[str, Tensor] | None]] = {"bare": self.bare}
        kinds |= {f"{axis} l2_mean": partial(self.one_axis, axis) for axis in AXES}
        kinds |= {name: partial(self.scored, *metrics) for name, metrics in METRICS.items()}
        kinds |= {"second moments": self.moments}
        passes: dict[str, Pass] = {name: partial(run, tokens=self.tokens) for name, run in kinds.items()}
        return passes | {"warm_up": partial(self.bare, tokens=self.tokens[: self.micro_batch])}

    def bare(self, tokens: Tensor) -> None:
        """The forward pass without hooks."""
        forward_each(self.chunks, list(tokens.split(self.micro_batch)), lambda *_: None)

    def scored(self, width: list[WidthMetric], depth: list[DepthMetric], tokens: Tensor) -> dict[str, Tensor]:
        """Vectors named as a tool with one metric has them: those of the default pair, and `depth`."""
        cfg = self._config(width, depth)
        running = ScoreState()
        running.add(self._collect(cfg, tokens), len(tokens))
        prefix = f"{DEFAULT.name}."
        scores = running.rankings(self.dims, cfg)
        plain = {name.removeprefix(prefix): x for name, x in scores.items() if name.startswith(prefix)}
        if DEFAULT in width:
            norms = range(2 * self.dims.num_layers)
            each = [running.states[f"norm.{k}", Aggregator.mean].result(Aggregator.l2) for k in norms]
            plain[UNNORMED] = torch.stack(each).sum(dim=0)
        return plain | ({"depth": scores["depth.bi"]} if "depth.bi" in scores else {})

    def one_axis(self, axis: str, tokens: Tensor) -> None:
        """The default pair with the hooks of one axis only, up to its states."""
        with mock.patch.object(activations, "ActivationHooks", partial(OneAxis, axis, tokens.shape[1])):
            self._collect(self._config([DEFAULT], NO_DEPTH), tokens)

    def moments(self, tokens: Tensor) -> None:
        """Second moments of all inputs, without scores."""
        moments = MomentCollector(self.chunks)
        moments.on_batch(self.micro_batch)
        self.bare(tokens)
        moments.reduce()

    def _config(self, width: list[WidthMetric], depth: list[DepthMetric]) -> ScoreConfig:
        return ScoreConfig(samples=len(self.tokens), micro_batch=self.micro_batch, width=width, depth=depth)

    def _collect(self, cfg: ScoreConfig, tokens: Tensor) -> dict[activations.StateKey, activations.State]:
        return activations.collect(self.chunks, tokens, cfg, lambda _: None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times this package's scoring; bench.importance starts it.")
    add_run_arguments(parser)
    args = parser.parse_args()
    answers = answers_only()
    with launched(ParallelConfig(), seed=1) as mesh:
        serve(answers, Subject(mesh, args).passes(), {"threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
