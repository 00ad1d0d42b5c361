"""Depth metrics of the score stage that need more than one forward pass: blocks, layers left out, tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compactlm_nemo.config.score import DepthMetric
from compactlm_nemo.data.marks import counts_of
from compactlm_nemo.evaluation.harness import accuracy, run_tasks_without
from compactlm_nemo.importance.block_importance import block_importance, state_cosines
from compactlm_nemo.importance.depth import (
    LayerSums,
    layer_sums,
    lm_loss_rise,
    logit_mse,
    logit_mse_iterative,
    num_predictions,
)
from compactlm_nemo.losses.linear_ce import linear_ce
from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.hf import export_hf
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.interruption import stop_if_asked
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.parallel.world import is_main_rank
from compactlm_nemo.progress import progress_bar
from compactlm_nemo.stages.context import HF
from compactlm_nemo.stages.score_pass import Scoring

Measure = Callable[[Tensor, Callable[[int], None]], Tensor]
"""(samples, advance) -> a sum over them, equal on every rank."""


def measure_layers(scoring: Scoring) -> dict[str, Tensor]:
    """Return the vectors of all these metrics that are asked for, by metric, on the main rank at least. Collective."""
    wanted = set(scoring.cfg.depth)
    vectors: dict[DepthMetric, Tensor] = {}
    if DepthMetric.bi_blocks in wanted:
        vectors[DepthMetric.bi_blocks] = blocks(scoring)
    if wanted & {DepthMetric.lm_loss, DepthMetric.logit_mse, DepthMetric.logit_mse_iterative}:
        sums = left_out(scoring, frozenset())
        measured = {DepthMetric.lm_loss: lm_loss_rise, DepthMetric.logit_mse: logit_mse}
        vectors |= {metric: rule(sums) for metric, rule in measured.items() if metric in wanted}
    if DepthMetric.logit_mse_iterative in wanted:
        vectors[DepthMetric.logit_mse_iterative], _ = logit_mse_iterative(
            lambda removed: logit_mse(left_out(scoring, removed)), scoring.cfg.iterations
        )
    if DepthMetric.lm_loss_blocks in wanted:
        vectors[DepthMetric.lm_loss_blocks] = blocks_by_loss(scoring)
    if DepthMetric.tasks in wanted:
        vectors[DepthMetric.tasks] = tasks(scoring)
    return {metric.name: vector for metric, vector in vectors.items()}


def _in_parts(scoring: Scoring, name: str, samples: int, measure: Measure) -> Tensor:
    """Return A sum over the first samples, saved every `score.save_every` of them under `name`; equal on every rank."""
    running = scoring.running
    done = broadcast_object(running.summed.get(name, 0))
    if done == samples:
        return broadcast_object(running.sums[name] if is_main_rank() else torch.empty(0))
    with scoring.progress(name, samples - done) as advance:
        while done < samples:
            part_NS = scoring.windows_NS[done : min(done + scoring.cfg.save_every, samples)]
            value = measure(part_NS, advance)
            with main_rank_writes() as writes:
                if writes:
                    running.add_sum(name, value, len(part_NS))
                    scoring.keep()
            done += len(part_NS)
            stop_if_asked(f"{name} of {done} of {samples} samples is kept")
    return broadcast_object(running.sums[name] if is_main_rank() else torch.empty(0))


def blocks(scoring: Scoring) -> Tensor:
    """Return block importance of every contiguous block, from all samples."""
    windows_NS = scoring.windows_NS

    def measure(part_NS: Tensor, advance: Callable[[int], None]) -> Tensor:
        return state_cosines(scoring.teacher, part_NS, micro_batch=scoring.cfg.micro_batch, progress=advance)

    tokens = int(counts_of(windows_NS).sum())
    return block_importance(_in_parts(scoring, "bi_blocks", len(windows_NS), measure), tokens)


def blocks_by_loss(scoring: Scoring) -> Tensor:
    """Return `[L, L]`: rise of the loss without the n layers from layer i on at ``[i, n - 1]``, NaN if not measured."""
    result = torch.full((scoring.dims.num_layers, scoring.dims.num_layers), torch.nan)
    for length in scoring.cfg.block_lengths:
        result[:, length - 1] = lm_loss_rise(left_out(scoring, frozenset(), length)).float()
    return result


def left_out(scoring: Scoring, removed: frozenset[int], block: int | None = None) -> LayerSums:
    """Measure what the model loses without each layer or block, besides those removed before."""
    asked, samples = set(scoring.cfg.depth), scoring.cfg.depth_samples or len(scoring.windows_NS)

    def token_losses(hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
        everywhere_N = torch.ones_like(labels_N, dtype=torch.float32)
        return linear_ce(hidden_NH, scoring.teacher.head(), labels_N, everywhere_N)

    def measure(part_NS: Tensor, advance: Callable[[int], None]) -> Tensor:
        return layer_sums(
            scoring.teacher,
            part_NS,
            micro_batch=scoring.cfg.micro_batch,
            token_losses=token_losses if block or (DepthMetric.lm_loss in asked and not removed) else None,
            logits=not block and bool(asked & {DepthMetric.logit_mse, DepthMetric.logit_mse_iterative}),
            removed=removed,
            block=block or 1,
            progress=advance,
        ).sums

    name = ".".join([f"{block}_left_out" if block else "left_out", *map(str, sorted(removed))])
    sums = _in_parts(scoring, name, samples, measure)
    tokens = num_predictions(scoring.windows_NS[:samples])
    absent = removed | set(range(scoring.dims.num_layers - (block or 1) + 1, scoring.dims.num_layers))
    return LayerSums(sums=sums, tokens=tokens, layers_run=0, removed=absent)


def tasks(scoring: Scoring) -> Tensor:
    """Return `[L]`: accuracy of the model minus that without the block of `score.task_block` layers from each layer on.

    NaN where no block begins. Measured by lm-eval on the exported teacher; the main rank does it alone.
    """
    run, dims, size = scoring.run, scoring.dims, scoring.cfg.task_block
    starts = range(dims.num_layers - size + 1)
    scores = torch.full((dims.num_layers,), torch.nan)
    with main_rank_writes() as writes:
        if writes:
            folder = scoring.state / "as_hf"
            if not (folder / "config.json").exists():
                export_hf(
                    run.path("teacher") / HF, folder, dims, CheckpointSource(run.path("teacher"), dims), run.dtype
                )
            removals = [[], *([start + i for i in range(size)] for start in starts)]
            with progress_bar("tasks without layers", len(removals), 1) as advance:
                results = run_tasks_without(
                    folder, run.config.evaluate, removals, scoring.state / "tasks.jsonl", lambda: advance(1)
                )
            whole, *without = map(accuracy, results)
            scores[: len(without)] = torch.tensor([whole - value for value in without])
    return scores
