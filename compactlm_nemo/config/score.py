"""Settings of importance: what is measured, and on how much text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class Aggregator(Enum):
    """How values over a dimension become one number: mean(|x|), sqrt(sum x^2) or variance."""

    mean = "mean"
    l2 = "l2"
    var = "var"


class WidthMetric(Enum):
    """What ranks heads, query groups, neurons, hidden channels and experts.

    ``BATCH_SEQUENCE``: activations by a pair of aggregators, the sequence one applied first. ``taylor``: |w * dL/dw|.
    """

    mean_mean = "mean_mean"
    mean_l2 = "mean_l2"
    mean_var = "mean_var"
    l2_mean = "l2_mean"
    l2_l2 = "l2_l2"
    l2_var = "l2_var"
    var_mean = "var_mean"
    var_l2 = "var_l2"
    var_var = "var_var"
    taylor = "taylor"

    @property
    def pair(self) -> tuple[Aggregator, Aggregator] | None:
        """(batch, sequence) aggregators; None where activations are not what counts."""
        if self is WidthMetric.taylor:
            return None
        batch, sequence = self.value.split("_")
        return Aggregator[batch], Aggregator[sequence]


class DepthMetric(Enum):
    """What ranks layers."""

    bi = "bi"
    """Block importance, 1 - E[cos(input, output)]."""
    bi_blocks = "bi_blocks"
    """Block importance of every contiguous block of layers."""
    lm_loss = "lm_loss"
    """Rise of the language-model loss when one layer is left out."""
    lm_loss_blocks = "lm_loss_blocks"
    """The same, when a contiguous block of `score.block_lengths` layers is left out."""
    logit_mse = "logit_mse"
    """Normalised squared error of the logits when one layer is left out."""
    logit_mse_iterative = "logit_mse_iterative"
    """The same, where the least important layer is removed for good and the others are measured again."""
    tasks = "tasks"
    """Fall of the accuracy on `evaluate.tasks` when one block of layers is left out."""


class ExpertMetric(Enum):
    """What ranks experts: a width metric over all tokens, or the mean over the tokens that were sent to one (REAP)."""

    width = "width"
    reap = "reap"


BLOCK_METRICS = (DepthMetric.bi_blocks, DepthMetric.lm_loss_blocks)
"""Depth metrics of contiguous blocks: a cut by one of them takes out one block."""


class Neurons(Enum):
    """Where neurons are measured: the input of fc2, or the first linear layer's output before the activation."""

    after = "after"
    before = "before"


@dataclass(kw_only=True)
class ScoreConfig:
    samples: int = setting(1024)
    """Calibration samples of `data.sequence_length` tokens (the paper: 1024)."""
    data: dict[str, Any] = setting({}, changes_result=False)
    """Texts of data.train that calibration draws from, name to share, for scores, second moments and refits; {} takes
    the training blend. These shares decide the result."""
    micro_batch: int = setting(4, changes_result=False)
    """Samples per forward pass on one rank."""
    width: list[WidthMetric] = setting([WidthMetric.l2_mean])
    """Metrics of heads, groups, neurons, channels and experts, all from one pass; the paper's best is l2_mean."""
    depth: list[DepthMetric] = setting([DepthMetric.bi])
    """Metrics of layers."""
    neurons: Neurons = setting(Neurons.after)
    """Neurons before or after the activation; the paper's formula is before, its peers measure after."""
    depth_samples: int | None = setting(None)
    """Samples of the metrics that leave layers out (they cost about layers / 2 passes); null takes all."""
    iterations: int = setting(1)
    """Layers that logit_mse_iterative removes one after another."""
    task_block: int = setting(1)
    """Layers in a block that `tasks` leaves out; the second paper removes one contiguous block."""
    block_lengths: list[int] = setting([])
    """Layers in the blocks that `lm_loss_blocks` leaves out, one walk for each length."""
    second_moments: bool = setting(False)
    """Keep the input covariance of output projections and fc2 and of each norm's output, for reconstruction."""
    expert_moments: bool = setting(False)
    """With `score.second_moments` also those of every routed expert's fc2: experts x width^2 numbers a layer."""
    start_from: str | None = setting(None)
    """Folder of a finished score stage on the same texts and seed whose samples count as measured: with a larger
    `score.samples` only the further ones are run. Activation metrics only."""
    save_every: int = setting(256)
    """Samples after which progress is kept; a killed run goes on from there."""
    stop_tolerance: float | None = setting(None)
    """Stop early when no axis has moved by more than this (1 - Kendall's tau) between two saves; null never stops."""
    stop_checks: int = setting(3)
    """Saves in a row that must be within `score.stop_tolerance`."""

    def __post_init__(self) -> None:
        require(self.samples > 0, f"score.samples={self.samples} must be > 0; the paper uses 1024.")
        for name, share in self.data.items():
            is_share = isinstance(share, (int, float)) and not isinstance(share, bool) and share > 0
            require(is_share, f"score.data.{name}={share} must be a number > 0; leave the text out instead.")
        for name in ("micro_batch", "iterations", "task_block", "save_every", "stop_checks"):
            require(getattr(self, name) > 0, f"score.{name}={getattr(self, name)} must be > 0.")
        require(
            self.depth_samples is None or 0 < self.depth_samples <= self.samples,
            f"score.depth_samples={self.depth_samples} must be in [1, score.samples={self.samples}]; null takes all.",
        )
        require(
            self.stop_tolerance is None or 0 <= self.stop_tolerance < 1,
            f"score.stop_tolerance={self.stop_tolerance} must be in [0, 1); try 0.01.",
        )
        require(
            (DepthMetric.lm_loss_blocks in self.depth) == bool(self.block_lengths),
            f"score.depth=[lm_loss_blocks] and score.block_lengths={self.block_lengths} need each other; set both.",
        )
        require(
            all(length > 0 for length in self.block_lengths),
            f"score.block_lengths={self.block_lengths} must be numbers > 0; leave out what is not.",
        )
        require(
            self.second_moments or not self.expert_moments,
            "score.expert_moments=true needs score.second_moments=true; set both.",
        )
        for name in ("width", "depth"):
            given = getattr(self, name)
            require(len(given) > 0, f"score.{name} is empty; name at least one metric.")
            require(len(set(given)) == len(given), f"score.{name} names a metric twice; name each once.")
