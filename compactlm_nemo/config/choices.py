"""Settings with named values: OmegaConf matches an Enum by the name of its member."""

from __future__ import annotations

from enum import Enum


class Precision(Enum):
    """Number format of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


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


BLOCK_METRICS = (DepthMetric.bi_blocks, DepthMetric.lm_loss_blocks)
"""Depth metrics of contiguous blocks: a cut by one of them takes out one block."""


class Neurons(Enum):
    """Where neurons are measured: the input of fc2, or the first linear layer's output before the activation."""

    after = "after"
    before = "before"


class HeadCut(Enum):
    """What becomes of the query heads that are cut: gone, or merged into kept ones as in the first Minitron paper."""

    cut = "cut"
    merge = "merge"


class Reconstruct(Enum):
    """Whether the maps that lose inputs are refitted to what is left of them."""

    none = "none"
    least_squares = "least_squares"


class Stream(Enum):
    """How the residual stream is narrowed: by keeping channels, or by turning it to its principal directions first."""

    select = "select"
    rotate = "rotate"


class ErrorAxis(Enum):
    """Units that can be chosen by the error that is left after refitting, in place of their scores."""

    heads = "heads"
    mlp = "mlp"


class WandbMode(Enum):
    """Where W&B metrics go; `auto` is online with a login in the environment and disabled without."""

    auto = "auto"
    disabled = "disabled"
    offline = "offline"
    online = "online"


class TeacherSource(Enum):
    """Who teaches: a teacher that runs beside the student, what one said before (`recipes.cache_teacher`), nobody."""

    live = "live"
    stored = "stored"
    none = "none"


class StoredKind(Enum):
    """What is stored of a teacher: probabilities of its likeliest tokens, or its final hidden states."""

    top_k = "top_k"
    hidden = "hidden"


class Result(Enum):
    """Which of a training's weights are its result."""

    last = "last"
    best = "best"


class StateLoss(Enum):
    """How hidden states of teacher and student are compared."""

    mse = "mse"
    cosine = "cosine"


class Projection(Enum):
    """Learned maps between the widths of two models whose hidden states are compared."""

    shared = "shared"
    per_pair = "per_pair"
    none = "none"
