"""The state of a scoring run is kept on disk every few samples, continued after a kill, and turned into scores.

Aggregator states are of whole vectors over all ranks, so a run may go on in another layout, and samples can be added to
a finished file. A run that is continued in its layout ends with the bits of one that never stopped, because both merge
after equal numbers of samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compactlm_nemo.config.score import Aggregator, DepthMetric, ScoreConfig, WidthMetric
from compactlm_nemo.errors import NumericsError
from compactlm_nemo.importance import names
from compactlm_nemo.importance.accumulator import StateKey
from compactlm_nemo.importance.aggregators import State
from compactlm_nemo.importance.agreement import settled
from compactlm_nemo.models.dims import Dims

STATE = "state.safetensors"


@dataclass
class ScoreState:
    """Aggregator states and sums over the first `samples` calibration windows."""

    samples: int = 0
    states: dict[StateKey, State] = field(default_factory=dict)
    settled_checks: int = 0
    """Saves in a row at which no ranking had moved beyond the tolerance."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Further measurements that add up over samples, by name."""
    summed: dict[str, int] = field(default_factory=dict)
    """Samples in each of `sums`."""

    def add(self, states: dict[StateKey, State], samples: int) -> None:
        """Merge the states of the next samples."""
        for key, state in states.items():
            self.states[key] = self.states[key].merged(state) if key in self.states else state
        self.samples += samples

    def add_sum(self, name: str, value: Tensor, samples: int) -> None:
        """Add to the measurement `name` its sum over the next samples."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.summed[name] = self.summed.get(name, 0) + samples

    def check_finite(self, dims: Dims) -> None:
        """Raise NumericsError with the first layer, in the model's order, that has NaN or infinite activations."""
        bad = [key for key, state in self.states.items() if not bool((state.mean + state.m2).isfinite().all())]
        if bad:
            (element, _) = min(bad, key=lambda key: _position(key[0]))
            raise NumericsError(
                f"score: {_described(element, dims)} activations are NaN or infinite; check the teacher's weights, or "
                "score with model.precision=fp32."
            )

    def save(self, path: Path) -> None:
        """Write the file; the caller replaces one atomically."""
        tensors: dict[str, Tensor] = {}
        for (element, agg), state in self.states.items():
            tensors |= {f"{element}/{agg.name}/{part}": x.clone() for part, x in state._asdict().items()}
        tensors |= {f"sum/{name}": x.clone() for name, x in self.sums.items()}
        metadata = {"samples": self.samples, "settled_checks": self.settled_checks, "summed": self.summed}
        save_file(tensors, path, metadata={"metadata": json.dumps(metadata, sort_keys=True)})

    @staticmethod
    def load(path: Path) -> ScoreState:
        """Read the state that `save` wrote; without a file the state is empty."""
        if not path.is_file():
            return ScoreState()
        states: dict[StateKey, dict[str, Tensor]] = {}
        sums: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["metadata"])
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name.startswith("sum/"):
                    sums[name.removeprefix("sum/")] = file.get_tensor(name)
                    continue
                element, agg, part = name.split("/")
                states.setdefault((element, Aggregator[agg]), {})[part] = file.get_tensor(name)
        merged = {key: State(**parts) for key, parts in states.items()}
        return ScoreState(metadata["samples"], merged, metadata["settled_checks"], sums, metadata["summed"])

    def rankings(self, dims: Dims, cfg: ScoreConfig) -> dict[str, Tensor]:
        """Compute the vectors of all activation metrics and of block importance, under the names of the scores file."""
        scores: dict[str, Tensor] = {}
        for metric in cfg.width:
            if metric.pair:
                scores |= {f"{metric.name}.{name}": x for name, x in self._width(dims, metric).items()}
        if any(metric.pair for metric in cfg.width):
            scores |= {f"{names.REAP}.{name}": x for name, x in self._over_routed_tokens(dims).items()}
        if DepthMetric.bi in cfg.depth:
            depth = [self._score(f"depth.{i}", Aggregator.mean, Aggregator.mean) for i in range(dims.num_layers)]
            scores[f"{names.DEPTH}.bi"] = torch.cat(depth)
        return {name: x.float() for name, x in scores.items()}

    def _score(self, element: str, batch: Aggregator, sequence: Aggregator) -> Tensor:
        return self.states[element, sequence].result(batch)

    def _width(self, dims: Dims, metric: WidthMetric) -> dict[str, Tensor]:
        assert metric.pair is not None
        batch, sequence = metric.pair

        def of(elements: Iterable[str]) -> list[Tensor]:
            return [self._score(element, batch, sequence) for element in elements]

        norms = of(f"norm.{k}" for k in range(2 * dims.num_layers + 1))
        scores = {names.HIDDEN: torch.stack(norms).sum(dim=0)}
        for i in range(dims.num_layers):
            (scores[names.heads_key(i)],) = of([f"heads.{i}"])
            (scores[names.groups_key(i)],) = of([f"groups.{i}"])
            if dims.is_dense(i):
                (scores[names.mlp_key(i)],) = of([f"mlp.{i}"])
                continue
            experts = range(dims.num_experts)
            scores[names.experts_key(i)] = torch.cat(of(f"experts.{i}.{e}" for e in experts))
            for e, neurons in enumerate(of(f"expert_mlp.{i}.{e}" for e in experts)):
                scores[names.expert_mlp_key(i, e)] = neurons
            if dims.shared_expert_ffn:
                (scores[names.shared_expert_key(i)],) = of([f"shared_expert.{i}"])
        return scores

    def _over_routed_tokens(self, dims: Dims) -> dict[str, Tensor]:
        """Return experts by the mean over the tokens sent to them, ``sum g ||f(x)|| / number``; 0 where none came.

        Source: REAP, arXiv:2510.13999, equation 9.
        """
        scores: dict[str, Tensor] = {}
        for i in (i for i in range(dims.num_layers) if not dims.is_dense(i)):
            means = [self._score(f"routed.{i}.{e}", Aggregator.mean, Aggregator.mean) for e in range(dims.num_experts)]
            norm_E, share_E = torch.stack(means, dim=1)
            scores[names.experts_key(i)] = torch.where(share_E > 0, norm_E / share_E, 0)
        return scores

    def has_converged(self, before: dict[str, Tensor], after: dict[str, Tensor], cfg: ScoreConfig) -> bool:
        """Count a save; True when every metric's rankings have stood still for `score.stop_checks` saves in a row."""
        if cfg.stop_tolerance is None or not before:
            return False
        moved = max(settled(_of(before, metric), _of(after, metric)) for metric in {n.split(".")[0] for n in after})
        self.settled_checks = self.settled_checks + 1 if moved <= cfg.stop_tolerance else 0
        return self.settled_checks >= cfg.stop_checks


def _of(scores: dict[str, Tensor], metric: str) -> dict[str, Tensor]:
    """Pick one metric's vectors; block importance gets the name of the depth axis."""
    vectors = {name.removeprefix(f"{metric}."): x for name, x in scores.items() if name.startswith(f"{metric}.")}
    return {names.DEPTH: vectors["bi"]} if metric == names.DEPTH else vectors


def _position(element: str) -> float:
    """Return the position of an element in the forward pass, in layers."""
    kind, number, *_ = element.split(".")
    if kind == "norm":
        return int(number) / 2
    return int(number) + {"heads": 0.1, "groups": 0.2, "depth": 0.9}.get(kind, 0.6)


def _described(element: str, dims: Dims) -> str:
    kind, number, *expert = element.split(".")
    if kind == "norm" and int(number) == 2 * dims.num_layers:
        return "hidden (final norm)"
    if kind == "norm":
        return f"layer {int(number) // 2} hidden ({'MLP' if int(number) % 2 else 'attention'} norm)"
    return f"layer {number} {kind}" + (f" {expert[0]}" if expert else "")
