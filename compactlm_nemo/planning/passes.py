"""Passes without training on a fake world: scores, walks without layers, stored targets, losses, reading weights."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import StoredKind
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.evaluation.token_values import TeacherStates, host_states, measure_tokens
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.block_importance import state_cosines
from compactlm_nemo.importance.depth import layer_sums
from compactlm_nemo.importance.moments import MomentCollector
from compactlm_nemo.importance.taylor import Gradients
from compactlm_nemo.losses.linear_ce import linear_ce, linear_ce_sum
from compactlm_nemo.losses.targets import top_k_targets
from compactlm_nemo.models.build import ModelChunks, fill
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.planning.fake_world import FakeWorld
from compactlm_nemo.planning.simulate import (
    FILE,
    GRADIENTS,
    HOST,
    SCORES,
    STUDENT,
    TEACHER,
    Cost,
    Simulation,
    build,
    dtype_of,
)
from compactlm_nemo.training.optimizer import wrap_data_parallel

LOADING = "loading"
"""Begins the names of phases in which a model is read."""


@contextlib.contextmanager
def _one_pass(there: FakeWorld, cost: Cost, phase: str = "pass", times: int = 1) -> Iterator[None]:
    """Count the body as one phase, and its work as that of several passes like it."""
    there.meter.start_work()
    there.meter.start_peak()
    yield
    cost.peaks[phase], cost.work = there.meter.peak, cost.work.plus(there.meter.work, times)


def _loaded(there: FakeWorld, config: Config, dims: Dims, kind: str, cost: Cost) -> ModelChunks:
    """Return a model for its forward pass, and count what was beside it while it was read.

    A tensor is read as it was stored and copied into its place: the largest is the output layer, or the embedding.
    """
    chunks = build(there, config, dims, kind).eval()
    there.meter.start_peak()
    there.meter.name([torch.empty_like(max(chunks.parameters(), key=lambda parameter: parameter.numel()))], FILE)
    cost.peaks[f"{LOADING} {kind}"] = there.meter.peak
    return chunks


def _no_progress(samples: int) -> None: ...


def scoring(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Score `count` micro-batches of a rank by activations, second moments included."""
    cfg, cost = config.score, Cost()
    chunks = _loaded(there, config, teacher, TEACHER, cost)
    windows = _windows(there, config, cfg.micro_batch, count)
    moments = MomentCollector(chunks, experts=cfg.expert_moments) if cfg.second_moments else None
    there.meter.keep(SCORES)
    with _one_pass(there, cost):
        if moments is not None:
            collect(chunks, windows, cfg, _no_progress, moments.on_batch)
        else:
            collect(chunks, windows, cfg, _no_progress)
    return cost


def differentiating(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Take the gradient of the loss on `count` micro-batches of a rank, for Taylor importance."""
    cost = Cost()
    chunks = _loaded(there, config, teacher, TEACHER, cost)

    def loss_sum(hidden_NH: Tensor, labels_N: Tensor, mask_N: Tensor) -> Tensor:
        return linear_ce_sum(hidden_NH, chunks.head(), labels_N, mask_N)

    gradients = Gradients(wrap_data_parallel(chunks, shard_gradients=False), loss_sum, config.score.micro_batch)
    there.meter.keep(GRADIENTS)
    with _one_pass(there, cost):
        gradients.add(_windows(there, config, config.score.micro_batch, count), _no_progress)
    return cost


def comparing_blocks(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Compare the states between all layers on `count` micro-batches of a rank."""
    cost, size = Cost(), config.score.micro_batch
    chunks = _loaded(there, config, teacher, TEACHER, cost)
    with _one_pass(there, cost):
        state_cosines(chunks, _windows(there, config, size, count), micro_batch=size, progress=_no_progress)
    return cost


def leaving_out(block: int = 1, *, losses: bool, logits: bool) -> Simulation:
    """Return the walk that leaves out each layer in turn, or each block of so many, on micro-batches of a rank."""
    return partial(_walk, block=block, losses=losses, logits=logits)  # which goes to other processes


def _walk(
    there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int, *, block: int, losses: bool,
    logits: bool,
) -> Cost:  # fmt: skip
    cost, size = Cost(), config.score.micro_batch
    chunks = _loaded(there, config, teacher, TEACHER, cost)

    def token_losses(hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
        everywhere_N = torch.ones_like(labels_N, dtype=torch.float32)
        return linear_ce(hidden_NH, chunks.head(), labels_N, everywhere_N)

    with _one_pass(there, cost):
        layer_sums(
            chunks, _windows(there, config, size, count), micro_batch=size, logits=logits, block=block,
            token_losses=token_losses if losses else None, progress=_no_progress,
        )  # fmt: skip
    return cost


def caching(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Run the teacher over `count` micro-batches of a rank, as the cache_teacher stage does."""
    cfg, cost, size = config.cache, Cost(), config.cache.micro_batch
    chunks = _loaded(there, config, teacher, TEACHER, cost)
    batches = [torch.zeros(size, config.data.sequence_length, dtype=torch.long) for _ in range(count)]

    def keep(idx: int, hidden_SBG: Tensor) -> None:
        if cfg.kind is StoredKind.top_k:
            top_k_targets(hidden_SBG.transpose(0, 1).flatten(0, 1), chunks.head(), batches[idx].flatten(), k=cfg.k)

    with _one_pass(there, cost):
        forward_each(chunks, batches, keep)
    return cost


def evaluating(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Measure the teacher, and the pruned and the distilled student against it, on `count` micro-batches each.

    Of the teacher its output weights stay on the device, and its final states on the host.
    """
    cost, size = Cost(), config.evaluate.micro_batch
    windows = torch.zeros(count * there.mesh.dp_size * size, config.data.sequence_length + 1, dtype=torch.long)
    left: TeacherStates | None = None
    for dims, kind, times in ((teacher, TEACHER, 1), (student, STUDENT, 2)):
        chunks = _loaded(there, config, dims, kind, cost)
        states = host_states(chunks, windows, micro_batch=size)
        there.meter.name(states, HOST)
        with _one_pass(there, cost, kind, times):
            measure_tokens(chunks, windows, states, micro_batch=size, progress=_no_progress, teacher=left)
        if left is None:
            left = TeacherStates(states, chunks.head_weight.detach() if there.mesh.is_last_stage else None)
        del chunks, states
        gc.collect()
    return cost


def teachers_loss(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Measure the teacher's loss on `count` micro-batches of a rank."""
    return _loss(there, config, teacher, TEACHER, count)


def students_loss(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Measure the student's loss on `count` micro-batches of a rank."""
    return _loss(there, config, student, STUDENT, count)


def _loss(there: FakeWorld, config: Config, dims: Dims, kind: str, count: int) -> Cost:
    cost, size = Cost(), config.evaluate.micro_batch
    chunks = _loaded(there, config, dims, kind, cost)
    windows = torch.zeros(count * there.mesh.dp_size * size, config.data.sequence_length + 1, dtype=torch.long)
    with _one_pass(there, cost, kind):
        evaluate_lm_loss(chunks, windows, micro_batch=size, progress=_no_progress)
    return cost


def loading(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Read the teacher, one whole parameter at a time."""
    cost, shapes = Cost(), parameter_shapes(teacher)
    chunks = build(there, config, teacher, TEACHER)

    def source(name: str) -> Tensor:
        whole = torch.empty(shapes[name], dtype=dtype_of(config))
        there.meter.name([whole], FILE)
        return whole

    with _one_pass(there, cost), torch.no_grad():
        fill(chunks, source, config.model.vocab_multiple)
    return cost


def _windows(there: FakeWorld, config: Config, micro_batch: int, count: int) -> Tensor:
    """Return windows of which a rank has `count` micro-batches."""
    return torch.zeros(count * there.mesh.dp_size * micro_batch, config.data.sequence_length, dtype=torch.long)
