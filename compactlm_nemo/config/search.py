"""Settings of the search: sizes to try, and budgets that a candidate must meet."""

from __future__ import annotations

from dataclasses import dataclass

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.config.profile import Engine, Phase
from compactlm_nemo.config.score import DepthMetric, ExpertMetric, WidthMetric
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class SearchConfig:
    """Space and budget. An empty axis keeps the teacher's value."""

    layers: list[int] = setting([])
    """Numbers of layers to try."""
    heads: list[int] = setting([])
    """Numbers of query heads to try: multiples of the query groups, with at most the teacher's heads in each."""
    groups: list[int] = setting([])
    """Numbers of query groups to try; whole groups are cut with their keys and values."""
    ffn: list[int] = setting([])
    """MLP widths to try; of a model with experts the width of one."""
    hidden: list[int] = setting([])
    """Hidden sizes to try."""
    experts: list[int] = setting([])
    """Numbers of experts to try, at least as many as a token is sent to."""
    shared_expert_ffn: list[int] = setting([])
    """Widths of the expert that sees every token to try."""
    ffn_multiples: list[float] = setting([])
    """MLP widths as multiples of the hidden size; excludes `search.ffn`."""
    multiples: dict[str, int] = setting({})
    """Axis to step: every multiple of it is tried that `parallel.tp` can split, as in `search.multiples.hidden=64`;
    excludes values of that axis."""
    divisors: list[str] = setting([])
    """Axes of which every divisor of the teacher's value is tried that `parallel.tp` can split; excludes values of that
    axis."""
    smallest: float = setting(0.5)
    """Share of the teacher's value at which `search.multiples` and `search.divisors` begin; they end at that value."""
    params: float | None = setting(None)
    """Target parameter count, within `search.band`; null sets no target."""
    non_embedding_params: float | None = setting(None)
    """Target count of parameters outside embedding and output layer, within `search.band`."""
    active_params: float | None = setting(None)
    """Target count of parameters that a token uses, within `search.band`."""
    memory_bytes: float | None = setting(None)
    """Most bytes of weights and of keys and values of `search.batch` sequences of `search.context` tokens."""
    flops: float | None = setting(None)
    """Most forward FLOPs of a token at `search.context` tokens."""
    latency_ms: float | None = setting(None)
    """Most milliseconds of a forward pass over `search.batch` sequences of `search.context` tokens in this layout, from
    layers timed on the present device."""
    latency_profile: str | None = setting(None, changes_result=False)
    """profile.json of an earlier run with this teacher on this device: `search.latency_ms` is then of the phase and
    engine below, and timed layers are scaled to what the teacher took there. null takes layers as they are timed."""
    latency_phase: Phase = setting(Phase.prefill)
    """Whether `search.latency_ms` limits the time to the first token, or a step after it."""
    latency_engine: Engine | None = setting(None)
    """Engine of the profile whose times count; null takes its first."""
    band: float = setting(0.05)
    """Accepted relative distance from a target."""
    batch: int = setting(1)
    """Sequences of the memory and latency budgets."""
    context: int = setting(2048)
    """Tokens of a sequence of the memory, FLOPs and latency budgets."""
    bytes_per_value: int = setting(2)
    """Bytes of a weight, key or value in the memory budget."""
    top: int = setting(0)
    """Best candidates that are cut in memory and ranked again by their zero-shot loss; 0 trusts the prediction."""
    width: WidthMetric | None = setting(None)
    """Which of `score.width` ranks units; null takes the first."""
    depth: DepthMetric | None = setting(None)
    """Which of `score.depth` ranks layers; null takes the first."""

    experts_by: ExpertMetric = setting(ExpertMetric.width)
    """What ranks experts: width, the metric above, which counts 0 for a token that was sent elsewhere; or reap, the
    mean over the tokens that were sent to the expert."""

    def __post_init__(self) -> None:
        require(
            not (self.ffn and self.ffn_multiples),
            "search.ffn and search.ffn_multiples are both set; give one of them.",
        )
        require(0 <= self.band < 1, f"search.band={self.band} must be in [0, 1); the paper uses 0.05.")
        require(0 < self.smallest <= 1, f"search.smallest={self.smallest} must be in (0, 1]; try 0.5.")
        require(self.top >= 0, f"search.top={self.top} must be >= 0; 0 builds no candidate.")
        for name in ("params", "non_embedding_params", "active_params", "memory_bytes", "flops", "latency_ms"):
            value = getattr(self, name)
            require(value is None or value > 0, f"search.{name}={value} must be > 0; null sets no budget.")
        self._check_profile()
        for name in ("batch", "context", "bytes_per_value"):
            require(getattr(self, name) > 0, f"search.{name}={getattr(self, name)} must be > 0.")
        axes = ("layers", "hidden", "ffn", "heads", "groups", "experts", "shared_expert_ffn")
        require(
            all(number > 0 for number in self.groups),
            f"search.groups={self.groups} must be numbers > 0; leave out what is not.",
        )
        for axis in [*self.multiples, *self.divisors]:
            require(axis in axes, f"search.multiples and search.divisors know no axis {axis}; use one of {list(axes)}.")
            require(
                not getattr(self, axis) and not (axis == "ffn" and self.ffn_multiples),
                f"search.{axis} has both values and a rule; give one of them.",
            )
        for axis, step in self.multiples.items():
            require(step > 0, f"search.multiples.{axis}={step} must be > 0.")

    def _check_profile(self) -> None:
        """Refuse settings of a profile that have no effect."""
        if self.latency_profile is not None:
            require(
                self.latency_ms is not None,
                f"search.latency_profile={self.latency_profile} is read for search.latency_ms alone; set it, or leave "
                "the profile out.",
            )
            return
        require(
            self.latency_phase is Phase.prefill and self.latency_engine is None,
            "search.latency_phase and search.latency_engine are read with search.latency_profile alone; set "
            "search.latency_profile=RUN/profile/profile.json, or leave them out.",
        )
