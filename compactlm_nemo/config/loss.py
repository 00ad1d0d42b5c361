"""Settings of the distillation losses: between logits, and between hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


class StateLoss(Enum):
    """How hidden states of teacher and student are compared."""

    mse = "mse"
    cosine = "cosine"


class Projection(Enum):
    """Learned maps between the widths of two models whose hidden states are compared."""

    shared = "shared"
    per_pair = "per_pair"
    none = "none"


@dataclass(kw_only=True)
class HiddenConfig:
    """Pairs [teacher layer, student layer], 0-based, negative from the end; none adds no loss. The paper compares the
    third last layers, [[-3,-3]], and the embeddings of students that lost many layers."""

    layers: list[list[int]] = setting([])
    """Pairs of layers whose outputs are compared, behind the norm that reads them."""
    attention: list[list[int]] = setting([])
    """Pairs of layers whose attention outputs are compared."""
    mlp_input: list[list[int]] = setting([])
    """Pairs of layers whose MLP inputs, behind the norm, are compared."""
    embedding: bool = setting(False)
    """Compare the embeddings too."""
    loss: StateLoss = setting(StateLoss.mse)
    """mse: mean over channels of the squared difference. cosine: 1 - cosine."""
    projection: Projection = setting(Projection.shared)
    """Learned map from the student's width to the teacher's: one for all pairs, one a pair, or none at equal widths."""
    weight: float | None = setting(None)
    """Weight of the sum of these losses; null takes the ratio of the logit loss to it in the step before."""

    def maps(self) -> dict[str, list[list[int]]]:
        """Return the pairs of layers of each kind."""
        return {"layers": self.layers, "attention": self.attention, "mlp_input": self.mlp_input}

    @property
    def is_on(self) -> bool:
        """Whether anything is compared."""
        return self.embedding or any(self.maps().values())

    def __post_init__(self) -> None:
        for name, pairs in self.maps().items():
            for pair in pairs:
                require(len(pair) == 2, f"distill.hidden.{name}: {list(pair)} must be [teacher layer, student layer].")
        require(
            self.weight is None or 0 < self.weight < math.inf,
            f"distill.hidden.weight={self.weight} must be > 0; null balances it with the logit loss.",
        )


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the losses in their sum; 0 leaves one out. The paper's final recipe is the forward KL alone."""

    forward_kl: float = setting(1.0)
    """KL(teacher || student)."""
    reverse_kl: float = setting(0.0)
    """KL(student || teacher)."""
    jsd: float = setting(0.0)
    """b KL(teacher || m) + (1 - b) KL(student || m), m = b teacher + (1 - b) student, b = `distill.loss.jsd_beta`."""
    jsd_beta: float = setting(0.5)
    """Share of the teacher in the mixture of `distill.loss.jsd`."""
    skewed_kl: float = setting(0.0)
    """KL(teacher || a teacher + (1 - a) student), a = `distill.loss.skew`."""
    skew: float = setting(0.1)
    """Share of the teacher in the mixture of `distill.loss.skewed_kl`."""
    mse: float = setting(0.0)
    """Mean over the vocabulary of the squared difference of the logits."""
    cosine: float = setting(0.0)
    """1 - the cosine of the logits."""
    cross_entropy: float = setting(0.0)
    """Language-model loss of the student, without a teacher, at temperature 1."""

    @property
    def against_teacher(self) -> list[str]:
        """Names of the losses that count and compare the student with a teacher."""
        names = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "mse", "cosine")
        return [name for name in names if getattr(self, name)]

    def __post_init__(self) -> None:
        names = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "mse", "cosine", "cross_entropy")
        for name in names:
            weight = getattr(self, name)
            require(0 <= weight < math.inf, f"distill.loss.{name}={weight} must be >= 0; 0 leaves it out.")
        require(any(getattr(self, name) for name in names), "distill.loss has no weight > 0; forward_kl=1 is usual.")
        require(0 < self.jsd_beta < 1, f"distill.loss.jsd_beta={self.jsd_beta} must be in (0, 1); 0.5 is symmetric.")
        require(0 <= self.skew < 1, f"distill.loss.skew={self.skew} must be in [0, 1); 0.1 is usual.")


CROSS_ENTROPY = LossConfig(forward_kl=0.0, cross_entropy=1.0)
"""Plain training."""
