"""Passes without training on a fake world: scores, walks without layers, stored targets, losses, reading weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from compactlm_nemo.config.schema import Config
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.block_importance import state_cosines
from compactlm_nemo.importance.depth import layer_sums
from compactlm_nemo.importance.moments import MomentCollector
from compactlm_nemo.importance.taylor import Gradients
from compactlm_nemo.losses.linear_ce import linear_ce, linear_ce_sum
from compactlm_nemo.models.build import fill
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.planning.fake_world import FakeWorld
from compactlm_nemo.planning.simulate import (
    FILE,
    GRADIENTS,
    SCORES,
    STUDENT,
    TEACHER,
    Cost,
    Simulation,
    build,
    dtype_of,
)
from compactlm_nemo.training.optimizer import wrap_data_parallel


@contextlib.contextmanager
def _one_pass(there: FakeWorld, cost: Cost) -> Iterator[None]:
    """Count the body as one phase."""
    there.meter.start_work()
    there.meter.start_peak()
    yield
    cost.peaks["pass"], cost.work = there.meter.peak, there.meter.work


def _no_progress(samples: int) -> None: ...


def scoring(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Score `count` micro-batches of a rank by activations, second moments included."""
    cfg, cost = config.score, Cost()
    chunks = build(there, config, teacher, TEACHER).eval()
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
    chunks = build(there, config, teacher, TEACHER).eval()

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
    chunks = build(there, config, teacher, TEACHER).eval()
    with _one_pass(there, cost):
        state_cosines(chunks, _windows(there, config, size, count), micro_batch=size, progress=_no_progress)
    return cost


def leaving_out(block: int = 1, *, losses: bool, logits: bool) -> Simulation:
    """Return the walk that leaves out each layer in turn, or each block of so many, on micro-batches of a rank."""

    def walk(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
        cost, size = Cost(), config.score.micro_batch
        chunks = build(there, config, teacher, TEACHER).eval()

        def token_losses(hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
            everywhere_N = torch.ones_like(labels_N, dtype=torch.float32)
            return linear_ce(hidden_NH, chunks.head(), labels_N, everywhere_N)

        with _one_pass(there, cost):
            layer_sums(
                chunks, _windows(there, config, size, count), micro_batch=size, logits=logits, block=block,
                token_losses=token_losses if losses else None, progress=_no_progress,
            )  # fmt: skip
        return cost

    return walk


def caching(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Run the teacher over `count` micro-batches of a rank, as the cache_teacher stage does."""
    cost = Cost()
    chunks = build(there, config, teacher, TEACHER).eval()
    size, length = config.distill.micro_batch, config.data.sequence_length
    batches = [torch.zeros(size, length, dtype=torch.long) for _ in range(count)]
    with _one_pass(there, cost):
        forward_each(chunks, batches, lambda idx, hidden_SBG: None)
    return cost


def evaluating(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Measure the teacher's loss on `count` micro-batches of a rank."""
    return _losses(there, config, teacher, TEACHER, count)


def evaluating_student(there: FakeWorld, config: Config, teacher: Dims, student: Dims, count: int) -> Cost:
    """Measure the student's loss on `count` micro-batches of a rank."""
    return _losses(there, config, student, STUDENT, count)


def _losses(there: FakeWorld, config: Config, dims: Dims, kind: str, count: int) -> Cost:
    cost, size = Cost(), config.evaluate.micro_batch
    chunks = build(there, config, dims, kind).eval()
    windows = torch.zeros(count * there.mesh.dp_size * size, config.data.sequence_length + 1, dtype=torch.long)
    with _one_pass(there, cost):
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
