"""Settings of the text that the teacher writes."""

from __future__ import annotations

from dataclasses import dataclass

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class GenerateConfig:
    """Documents that the teacher writes from the beginning of a text on, for `data.train.NAME.generated=true`."""

    documents: int = setting(128)
    """Documents."""
    max_tokens: int = setting(512)
    """Tokens after which a document ends, where the teacher has not ended it."""
    temperature: float = setting(1.0)
    """Its logits are divided by this; 1 is the teacher's own distribution."""
    top_p: float = setting(0.98)
    """Each token is one of the likeliest that have this share of the probability together; 1 allows all."""
    seed: int | None = setting(None)
    """Seed of the documents, each of which has a random stream of its own; null takes `run.seed`."""
    batch: int = setting(64, changes_result=False)
    """Documents that grow at a time on one data-parallel rank: weights are read once for all of them."""

    def __post_init__(self) -> None:
        for name in ("documents", "max_tokens", "batch"):
            require(getattr(self, name) > 0, f"generate.{name}={getattr(self, name)} must be > 0; leave it out.")
        require(
            self.temperature > 0,
            f"generate.temperature={self.temperature} must be > 0; 1 is the teacher's own distribution.",
        )
        require(0 < self.top_p <= 1, f"generate.top_p={self.top_p} must be in (0, 1]; 1 allows every token.")
        require(self.seed is None or self.seed >= 0, f"generate.seed={self.seed} must be >= 0; null takes run.seed.")
