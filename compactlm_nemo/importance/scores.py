"""The scores file holds whole vectors of the model, one set a metric, and says what was scored on which tokens.

Names in `scores.safetensors`, float32, layers 0-based and global (`importance.names` makes them)::

    {width metric}.hidden                         [H]         channels of the residual stream
    {width metric}.layers.{i}.heads               [heads]     query heads
    {width metric}.layers.{i}.groups              [groups]    query groups
    {width metric}.layers.{i}.mlp                 [F]         neurons
    {width metric}.layers.{i}.experts             [experts]
    {width metric}.layers.{i}.experts.{e}.mlp     [F]         neurons of an expert
    {width metric}.layers.{i}.shared_expert.mlp   [F]
    reap.layers.{i}.experts                       [experts]   over the tokens that were sent to an expert
    depth.{depth metric}                          [layers]
    depth.{bi_blocks, lm_loss_blocks}             [layers, layers]   block of n layers from layer i at [i, n - 1],
                                                                     NaN where it does not fit or was not measured

Scores belong to the model and not to a layout. The header says which model, metrics and calibration tokens they are of.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compactlm_nemo.config.score import DepthMetric, ExpertMetric, WidthMetric
from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.importance.names import DEPTH, REAP

FILE = "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """A scores file in memory."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """The header: `model` (fingerprint of the teacher), `calibration` (SHA-256 of the tokens), `samples`,
    `sequence_length`, `neurons`, and the metrics as `width` and `depth`."""

    @property
    def width_metrics(self) -> list[str]:
        """Names of the width metrics in the order of `score.width`."""
        prefixes = {name.split(".")[0] for name in self.tensors}
        return self._in_order("width", [metric.name for metric in WidthMetric if metric.name in prefixes])

    @property
    def depth_metrics(self) -> list[str]:
        """Names of the depth metrics in the order of `score.depth`."""
        metrics = [metric.name for metric in DepthMetric if f"{DEPTH}.{metric.name}" in self.tensors]
        return self._in_order("depth", metrics)

    def _in_order(self, kind: str, metrics: list[str]) -> list[str]:
        order = self.metadata.get(kind, "").split(",")
        return sorted(metrics, key=lambda name: order.index(name) if name in order else len(order))

    def width(self, metric: str) -> dict[str, Tensor]:
        """Return the vectors `hidden`, `layers.{i}.heads`, ... of one metric, without its prefix."""
        self._require("width", metric, self.width_metrics)
        return {name.removeprefix(f"{metric}."): x for name, x in self.tensors.items() if name.startswith(f"{metric}.")}

    def depth(self, metric: str) -> Tensor:
        """Return the vector (or matrix) of a depth metric."""
        self._require("depth", metric, self.depth_metrics)
        return self.tensors[f"{DEPTH}.{metric}"]

    def ranking(
        self, width: WidthMetric | None, depth: DepthMetric | None, experts: ExpertMetric = ExpertMetric.width
    ) -> dict[str, Tensor]:
        """Return the vectors that decide a cut: one width metric's, and the depth metric's as `depth`; None: the first.

        With `ExpertMetric.reap` experts, not their neurons, have the scores over the tokens that were sent to them.

        `depth` holds one number a layer, or one a block (`DepthMetric` of blocks).
        """
        metrics = self.depth_metrics
        chosen = depth.name if depth else (metrics[0] if metrics else "")
        if chosen not in metrics:
            raise ConfigError(f"search.depth={chosen or None} must be one of {metrics}; add it to score.depth.")
        units = self.width(width.name if width else self.width_metrics[0])
        if experts is ExpertMetric.reap:
            units |= {
                name.removeprefix(f"{REAP}."): x for name, x in self.tensors.items() if name.startswith(f"{REAP}.")
            }
        return units | {DEPTH: self.depth(chosen)}

    def _require(self, kind: str, metric: str, metrics: list[str]) -> None:
        if metric not in metrics:
            raise ConfigError(
                f"search.{kind}={metric} is not in the scores, which hold {metrics}; add it to score.{kind}."
            )


def save_scores(path: Path, scores: Scores) -> None:
    """Write the file; the caller replaces a file atomically by renaming."""
    entry = json.dumps(scores.metadata, sort_keys=True)  # one entry: safetensors writes several in no fixed order
    save_file({name: x.contiguous() for name, x in scores.tensors.items()}, path, metadata={"metadata": entry})


def load_scores(path: Path) -> Scores:
    """Read a scores file, or that of a folder; CheckpointError when it is missing, damaged or of another kind."""
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; run the score stage first.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("metadata", "{}"))
            scores = Scores({name: file.get_tensor(name) for name in sorted(file.keys())}, metadata)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); run the score stage again.") from None
    if not scores.width_metrics and not scores.depth_metrics:
        raise CheckpointError(f"{path} holds no scores; give the scores.safetensors of a score stage.")
    return scores
