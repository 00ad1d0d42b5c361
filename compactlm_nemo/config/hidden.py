"""Settings of the losses between hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from compactlm_nemo.config.choices import Projection, StateLoss
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class HiddenConfig:
    """Pairs [teacher layer, student layer], 0-based, negative from the end; none adds no loss. The paper compares the
    third last layers, [[-3,-3]], and the embeddings of students that lost many layers."""

    layers: list[list[int]] = field(default_factory=list)
    """Pairs of layers whose outputs are compared, behind the norm that reads them."""
    attention: list[list[int]] = field(default_factory=list)
    """Pairs of layers whose attention outputs are compared."""
    mlp_input: list[list[int]] = field(default_factory=list)
    """Pairs of layers whose MLP inputs, behind the norm, are compared."""
    embedding: bool = False
    """Compare the embeddings too."""
    loss: StateLoss = StateLoss.mse
    """mse: mean over channels of the squared difference. cosine: 1 - cosine."""
    projection: Projection = Projection.shared
    """Learned map from the student's width to the teacher's: one for all pairs, one a pair, or none at equal widths."""
    weight: float | None = None
    """Weight of the sum of these losses; null takes the ratio of the logit loss to it in the step before."""

    def maps(self) -> dict[str, list[list[int]]]:
        """Kind -> pairs of layers."""
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
