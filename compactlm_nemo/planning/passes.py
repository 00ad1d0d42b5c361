"""Stages that run models forward, by the package's own code in a fake world."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import StoredKind
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.moments import MomentCollector
from compactlm_nemo.losses.targets import top_k_targets
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.planning.fake_world import FakeWorld
from compactlm_nemo.planning.meter import Work
from compactlm_nemo.planning.simulate import SCORES, STUDENT, TEACHER, Cost, build

LOADING = "loading"
"""Begins the names of phases in which a model is read."""


@contextlib.contextmanager
def _one_pass(there: FakeWorld, cost: Cost, phase: str, times: int = 1) -> Iterator[None]:
    """Count the body as one phase, and its work as that of several passes like it."""
    there.meter.start_work()
    there.meter.start_peak()
    yield
    cost.peaks[phase], cost.work = there.meter.peak, cost.work.plus(there.meter.work, times)


def _loaded(there: FakeWorld, config: Config, dims: Dims, kind: str, cost: Cost) -> ModelChunks:
    """Return a model for its forward pass, and count what was beside it while it was read.

    On the host a tensor is read as it was stored and copied into its place: the largest is the output layer, or the
    embedding. A GPU's memory does not see that.
    """
    chunks = build(there, config, dims, kind).eval()
    there.meter.start_peak()
    if not there.is_gpu:
        torch.empty_like(max(chunks.parameters(), key=lambda parameter: parameter.numel()))
    cost.peaks[f"{LOADING} {kind}"] = there.meter.peak
    return chunks


def scoring(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Score `count` micro-batches of a rank with every metric that was chosen, second moments included."""
    cfg, cost = config.score, Cost()
    chunks = _loaded(there, config, teacher, TEACHER, cost)
    windows = torch.zeros(count * there.mesh.dp_size * cfg.micro_batch, config.data.sequence_length, dtype=torch.long)
    moments = MomentCollector(chunks, experts=cfg.expert_moments) if cfg.second_moments else None
    there.meter.keep(SCORES)
    with _one_pass(there, cost, "pass"):
        if moments is not None:
            collect(chunks, windows, cfg, lambda samples: None, moments.on_batch)
        else:
            collect(chunks, windows, cfg, lambda samples: None)
    return cost


def caching(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Run the teacher over `count` micro-batches of a rank, as the cache_teacher stage does."""
    cfg, cost, size = config.cache, Cost(), config.cache.micro_batch
    chunks = _loaded(there, config, teacher, TEACHER, cost)
    batches = [torch.zeros(size, config.data.sequence_length, dtype=torch.long) for _ in range(count)]

    def keep(idx: int, hidden_SBG: torch.Tensor) -> None:
        if cfg.kind is StoredKind.top_k:
            top_k_targets(hidden_SBG.transpose(0, 1).flatten(0, 1), chunks.head(), batches[idx].flatten(), k=cfg.k)

    with _one_pass(there, cost, "pass"):
        forward_each(chunks, batches, keep)
    return cost


def evaluating(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Measure the loss of the teacher, and of the pruned and the distilled student, on `count` micro-batches each."""
    cost, size = Cost(work=Work()), config.evaluate.micro_batch
    windows = torch.zeros(count * there.mesh.dp_size * size, config.data.sequence_length + 1, dtype=torch.long)
    for dims, kind, models in ((teacher, TEACHER, 1), (student, STUDENT, 2)):
        chunks = _loaded(there, config, dims, kind, cost)
        with _one_pass(there, cost, kind, models):
            evaluate_lm_loss(chunks, windows, micro_batch=size, progress=lambda samples: None)
        del chunks
        gc.collect()
    return cost
