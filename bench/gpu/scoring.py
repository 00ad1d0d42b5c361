"""Importance scoring over the bare forward pass of the same model on the same tokens.

Of the passes of one round, bare, a, bare, b, bare, each scored one is held against the mean of the bare ones beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from torch import Tensor

from bench.gpu import clock, models
from bench.gpu.record import Record
from compactlm_nemo.config.score import ScoreConfig
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.moments import MomentCollector
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import forward_each, micro_batches
from compactlm_nemo.parallel.launch import launched

LAYERS = 8
SAMPLES = 16
ROUNDS = 5
MOST_RATIO = 1.05
SCORES = "scores"


def measure(record: Record, *, dry: bool) -> None:
    """Record the ratios of scoring, without and with second moments."""
    config = models.settings(f"score.samples={SAMPLES}", dry=dry)
    teacher, _ = models.shapes(config, dry=dry)
    teacher = teacher if dry else teacher.with_shape(layers=LAYERS)
    with launched(config.parallel, seed=1) as mesh:
        chunks = models.random_model(models.run_on(config, mesh), teacher).eval()
        windows_NS = models.random_tokens(teacher, SAMPLES, config.data.sequence_length)
        passes = {
            SCORES: partial(_scored, chunks, windows_NS, config.score),
            "scores and second moments": partial(_with_moments, chunks, windows_NS, config.score),
        }
        bare = partial(_bare, chunks, windows_NS, config.score)
        for warm_up in (bare, *passes.values()):
            warm_up()
        bares, ratios = _rounds(bare, passes, record.seconds_left)
    record.detail("bare ms", bares)
    record.detail("ratios", ratios)
    record.figure(f"bare forward, {SAMPLES} samples, {teacher.num_layers} layers", statistics.median(bares), "ms")
    record.figure("scores over bare forward", statistics.median(ratios[SCORES]), at_most=MOST_RATIO)
    for name in [name for name in passes if name != SCORES]:
        record.figure(f"{name} over bare forward", statistics.median(ratios[name]))


def _rounds(
    bare: clock.Run, passes: dict[str, Callable[[], None]], seconds_left: Callable[[], float]
) -> tuple[list[float], dict[str, list[float]]]:
    """Return the milliseconds of the bare passes and the ratios of the others; stops when time runs out."""
    bares, ratios = [clock.milliseconds(bare)], {name: [] for name in passes}
    for _ in clock.that_fit(ROUNDS, seconds_left):
        for name, run in passes.items():
            took = clock.milliseconds(run)
            bares.append(clock.milliseconds(bare))
            ratios[name].append(2 * took / (bares[-2] + bares[-1]))
    return bares, ratios


def _bare(chunks: ModelChunks, windows_NS: Tensor, cfg: ScoreConfig) -> None:
    forward_each(chunks, micro_batches(windows_NS, cfg.micro_batch), lambda *_: None)


def _scored(chunks: ModelChunks, windows_NS: Tensor, cfg: ScoreConfig) -> None:
    collect(chunks, windows_NS, cfg, lambda _: None)


def _with_moments(chunks: ModelChunks, windows_NS: Tensor, cfg: ScoreConfig) -> None:
    moments = MomentCollector(chunks)
    try:
        collect(chunks, windows_NS, cfg, lambda _: None, moments.on_batch)
    finally:
        moments.remove()
