"""The work of the search stage: candidates are enumerated, timed, predicted, measured and ranked."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compactlm_nemo.artifacts import atomic_write_text, sealed
from compactlm_nemo.config.profile import Phase
from compactlm_nemo.importance.names import DEPTH
from compactlm_nemo.importance.selection import keep_layers
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.devices import device, device_kind, device_name
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.parallel.world import is_main_rank, launch_world_size
from compactlm_nemo.progress import progress_bar
from compactlm_nemo.pruning.elimination import FILE as ELIMINATION
from compactlm_nemo.search.candidates import candidates_json, rank_candidates
from compactlm_nemo.search.latency import FILE as LATENCY
from compactlm_nemo.search.latency import LatencyTable
from compactlm_nemo.search.predicted_loss import predicted_loss
from compactlm_nemo.search.profiled import TeacherTime, read_teacher_time, refuse_other, scaled
from compactlm_nemo.search.space import Budget, enumerate_space, within
from compactlm_nemo.search.timing import time_layers
from compactlm_nemo.stages.context import Run
from compactlm_nemo.stages.pruner import Pruner


def search(run: Run, folder: Path) -> dict[str, Any]:
    """Write candidates.json, best first, from scores and budgets."""
    dims, cfg = run.dims("teacher"), run.config.search
    depth = run.unit_scores()[DEPTH]
    layers_of = (lambda count: keep_layers(depth, count).tolist()) if dims.dense_layers is not None else None
    candidates = enumerate_space(dims, cfg, run.config.parallel.tp, layers_of)
    timed = _timed_layers(run, candidates, folder)
    if timed is not None and cfg.latency_ms is not None:
        candidates = within(candidates, [Budget("latency_ms", cfg.latency_ms, timed.milliseconds)])
    pruner = Pruner(run)
    is_predicted = pruner.moments is not None and len(candidates) > 1
    if is_predicted or run.config.prune.by_error:
        pruner.eliminate_units(folder)
    ranked = rank_candidates(dims, candidates, run.unit_scores(), cfg)
    if timed is not None:
        ranked = [replace(c, latency_ms=timed.milliseconds(c.dims(dims))) for c in ranked]
    if is_predicted:
        predict = predicted_loss(dims, run.unit_scores(), load_file(folder / ELIMINATION))
        ranked = [replace(c, predicted_loss=predict(c.dims(dims))) for c in ranked]
        ranked.sort(key=lambda c: (c.predicted_loss, c.params))
    best = [replace(c, zero_shot_loss=pruner.candidate_loss(c.dims(dims), folder)) for c in ranked[: cfg.top]]
    ranked[: len(best)] = sorted(best, key=lambda c: c.zero_shot_loss or 0.0)
    with main_rank_writes() as writes:
        if writes:
            atomic_write_text(folder / "candidates.json", candidates_json(ranked))
    return {"candidates": len(ranked), "best": asdict(ranked[0])}


def _timed_layers(run: Run, found: list[Dims], folder: Path) -> LatencyTable | None:
    """Time the layers of these candidates; None without a latency budget. Times outlive the stage, in its progress."""
    cfg, layout = run.config.search, run.config.parallel
    if cfg.latency_ms is None:
        return None
    teacher, measured = run.dims("teacher"), _teacher_time(run)
    found = found if measured is None else [*found, teacher]  # whose timed layers are what its time is held against
    context = cfg.context if cfg.latency_phase is Phase.prefill else 1
    metadata = {
        "device": device_name(),
        "precision": run.config.model.precision.name,
        "batch": cfg.batch,
        "context": context,
        "model": run.fingerprint("teacher"),
        "parallel": vars(layout) | {"world": launch_world_size()},
    }
    path = run.progress / LATENCY
    if is_main_rank():
        run.drop_damaged_files()
    known = broadcast_object(LatencyTable.load(path, metadata))
    tokens_BS = torch.randint(found[0].vocab_size, (cfg.batch, context), generator=torch.Generator().manual_seed(0))

    def keep(table: LatencyTable) -> None:
        if is_main_rank():
            path.parent.mkdir(parents=True, exist_ok=True)
            with sealed(path) as temporary:
                table.save(temporary)

    with progress_bar("time layers", len(known.missing(found)), tokens_BS.numel()) as advance:
        table = time_layers(
            known, found, build=run.build, mesh=run.mesh, tokens_BS=tokens_BS.to(device()), keep=keep, progress=advance
        )
    if measured is not None:
        table = scaled(table, teacher, measured.milliseconds)
    if is_main_rank():
        table.save(folder / LATENCY)
    return table


def _teacher_time(run: Run) -> TeacherTime | None:
    """Return what the teacher took where it was profiled, None without a profile."""
    path = run.config.search.latency_profile
    if path is None:
        return None
    time = read_teacher_time(run.config)
    refuse_other(time, path, teacher=run.fingerprint("teacher"), device=device_kind())
    return time
