"""Settings of the evaluation, and of the comparison of scores."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.config.score import WidthMetric
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class EvaluateConfig:
    tokens: int = setting(16384)
    """Held-out tokens per text (whole windows; fewer when the text is shorter)."""
    micro_batch: int = setting(4, changes_result=False)
    """Samples per forward pass on one rank."""

    resamples: int = setting(1000)
    """Random draws of documents (or questions) behind every interval and every p in `quality.json`, at least 100."""

    tasks: list[str] = setting([])
    """lm-eval tasks, run on teacher, pruned and distilled model as exported (needs the `eval` extra)."""
    task_folder: str | None = setting(None)
    """Folder with further lm-eval task files."""
    task_limit: int | None = setting(None)
    """Samples of each task; null takes all."""

    def __post_init__(self) -> None:
        require(self.tokens > 0, f"evaluate.tokens={self.tokens} must be > 0.")
        require(self.micro_batch > 0, f"evaluate.micro_batch={self.micro_batch} must be > 0.")
        require(
            self.resamples >= 100,
            f"evaluate.resamples={self.resamples} must be at least 100, or intervals are chance; 1000 is usual.",
        )
        require(
            self.task_limit is None or self.task_limit > 0,
            f"evaluate.task_limit={self.task_limit} must be > 0; null takes all samples.",
        )


@dataclass(kw_only=True)
class CompareConfig:
    """Settings of `recipes.compare_scores`, which reads finished scores and belongs to no run."""

    a: str = MISSING
    """Scores file, or the folder of a score stage."""
    b: str = MISSING
    """Scores of the same model to compare with; may be the same file."""
    width_a: WidthMetric | None = None
    """Width metric of `a` to compare with `width_b` of `b`, and nothing else; null compares all metrics in both."""
    width_b: WidthMetric | None = None
    """Width metric of `b` to compare with `width_a` of `a`; set both or none."""
    dry_run: bool = False
    """Check that both files can be compared, print the resolved configuration, and exit 0."""

    def __post_init__(self) -> None:
        given, other = ("width_a", "width_b") if self.width_a else ("width_b", "width_a")
        require(
            (self.width_a is None) == (self.width_b is None),
            f"{given} is set and {other} is not; name one metric of each file, or leave both out.",
        )
