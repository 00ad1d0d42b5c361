"""The search stage: scores and budgets become ranked candidates."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compactlm_nemo.artifacts import atomic_write_text, read_manifest
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.devices import device, device_name
from compactlm_nemo.parallel.launch import is_main_rank, launch_world_size, main_rank_writes
from compactlm_nemo.progress import progress_bar
from compactlm_nemo.pruning.elimination import FILE as ELIMINATION
from compactlm_nemo.search.candidates import candidates_json, rank_candidates
from compactlm_nemo.search.latency import FILE as LATENCY
from compactlm_nemo.search.latency import LatencyTable
from compactlm_nemo.search.predicted_loss import predicted_loss
from compactlm_nemo.search.space import Budget, enumerate_space, within
from compactlm_nemo.search.timing import time_layers
from compactlm_nemo.stages.context import Run
from compactlm_nemo.stages.prune import Pruner


def _how_to_cut(config: Config) -> dict[str, Any]:
    """What a search needs to know of how its candidates are cut."""
    return {name: value for name, value in vars(config.prune).items() if name != "candidate"}


def _split(config: Config) -> dict[str, Any]:
    """The layout, where the candidates depend on it."""
    cfg = config.search
    return {"parallel.tp": config.parallel.tp} if cfg.multiples or cfg.divisors or cfg.latency_ms is not None else {}


def search(run: Run, folder: Path) -> dict[str, Any]:
    """Scores + budgets -> candidates.json, best first."""
    dims, cfg = run.dims("teacher"), run.config.search
    found = enumerate_space(dims, cfg, run.config.parallel.tp)
    timed = _timed_layers(run, found, folder)
    if timed is not None and cfg.latency_ms is not None:
        found = within(found, [Budget("latency_ms", cfg.latency_ms, timed.milliseconds)])
    cutting = Pruner(run)
    is_predicted = cutting.moments is not None and len(found) > 1
    if is_predicted or run.config.prune.by_error:
        cutting.eliminate_units(folder)
    ranked = rank_candidates(dims, found, run.ranking(), cfg)
    if timed is not None:
        ranked = [replace(c, latency_ms=timed.milliseconds(c.dims(dims))) for c in ranked]
    if is_predicted:
        predict = predicted_loss(dims, run.ranking(), load_file(folder / ELIMINATION))
        ranked = [replace(c, predicted_loss=predict(c.dims(dims))) for c in ranked]
        ranked.sort(key=lambda c: (c.predicted_loss, c.params))
    best = [replace(c, zero_shot_loss=cutting.candidate_loss(c.dims(dims), folder)) for c in ranked[: cfg.top]]
    ranked[: len(best)] = sorted(best, key=lambda c: c.zero_shot_loss or 0.0)
    with main_rank_writes() as writes:
        if writes:
            atomic_write_text(folder / "candidates.json", candidates_json(ranked))
    return {"candidates": len(ranked), "best": asdict(ranked[0])}


def _timed_layers(run: Run, found: list[Dims], folder: Path) -> LatencyTable | None:
    """Times of the layers of these candidates; None without a latency budget. What was timed is kept in `run.dir`."""
    cfg, layout = run.config.search, run.config.parallel
    if cfg.latency_ms is None:
        return None
    metadata = {
        "device": device_name(),
        "precision": run.config.model.precision.name,
        "batch": cfg.batch,
        "context": cfg.context,
        "model": read_manifest(run.dir / "teacher")["fingerprint"],
        "parallel": vars(layout) | {"world": launch_world_size()},
    }
    known = broadcast_object(LatencyTable.load(run.dir / LATENCY, metadata))
    tokens_BS = torch.randint(found[0].vocab_size, (cfg.batch, cfg.context), generator=torch.Generator().manual_seed(0))

    def keep(table: LatencyTable) -> None:
        if is_main_rank():
            table.save(run.dir / LATENCY)

    with progress_bar("time layers", len(known.missing(found)), tokens_BS.numel()) as advance:
        table = time_layers(
            known, found, build=run.build, mesh=run.mesh, tokens_BS=tokens_BS.to(device()), keep=keep, progress=advance
        )
    if is_main_rank():
        table.save(folder / LATENCY)
    return table
