"""The score stage: calibration windows through the teacher, part by part, into one scores file.

Progress lives in `run.dir/scoring` until the stage is complete. Every `score.save_every` samples the statistics of all
ranks are merged and saved; a killed run goes on from the last save.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from compactlm_nemo.artifacts import read_manifest, settings_of
from compactlm_nemo.config.choices import DepthMetric
from compactlm_nemo.config.schema import ScoreConfig, deciding
from compactlm_nemo.data.windows import calibration_windows
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.importance.collect import collect
from compactlm_nemo.importance.running import STATE, Running
from compactlm_nemo.importance.scores import FILE, Scores, load_scores, save_scores
from compactlm_nemo.models.build import Chunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.launch import device, is_main_rank, main_rank_writes
from compactlm_nemo.report.progress import progress_bar
from compactlm_nemo.run import Run, claim


def score(run: Run, folder: Path) -> dict[str, Any]:
    """Teacher + calibration windows -> scores.safetensors, and the statistics it was made from."""
    config, cfg, dims = run.config, run.config.score, run.dims("teacher")
    windows_NS = calibration_windows(run.train_prefixes(), cfg.samples, config.data.sequence_length, config.run.seed)
    about = {
        "model": read_manifest(run.dir / "teacher")["fingerprint"],
        "calibration": tokens_hash(windows_NS),
        "sequence_length": str(config.data.sequence_length),
        "neurons": cfg.neurons.name,
    }
    state = run.dir / "scoring"
    claim(state, settings_of({"score": deciding(cfg), "about": about}))
    teacher = run.load("teacher").eval()
    running = _start(run, state, windows_NS, about)
    running = measure_activations(run, teacher, dims, windows_NS.to(device()), running, state)
    tensors = running.rankings(dims, cfg) if is_main_rank() else {}
    samples = broadcast_object(running.samples)
    about |= {"samples": str(samples), "calibration": tokens_hash(windows_NS[:samples])}
    with main_rank_writes() as writes:
        if writes:
            running.save(folder / STATE)
            save_scores(folder / FILE, Scores(tensors, about))
            shutil.rmtree(state)
    return {"samples": samples, "tokens": samples * config.data.sequence_length, "calibration": about["calibration"]}


def tokens_hash(windows_NS: Tensor) -> str:
    """SHA-256 of the calibration tokens as little-endian int64, sample after sample."""
    return hashlib.sha256(windows_NS.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _start(run: Run, state: Path, windows_NS: Tensor, about: dict[str, str]) -> Running:
    """Statistics to go on from: those of an interrupted run, or of `score.start_from`; on the main rank."""
    running = Running()
    with main_rank_writes() as writes:
        if writes:
            running = Running.load(state / STATE)
            if not running.samples and run.config.score.start_from is not None:
                running = _finished(Path(run.config.score.start_from), run.config.score, windows_NS, about)
    return running


def _finished(folder: Path, cfg: ScoreConfig, windows_NS: Tensor, about: dict[str, str]) -> Running:
    """The statistics of a finished stage, after checking that they are of the first of these windows."""
    old = load_scores(folder).about
    running = Running.load(folder / STATE)
    expected = about | {"calibration": tokens_hash(windows_NS[: running.samples])}
    differing = [name for name in expected if old.get(name) != expected[name]]
    if differing or not running.samples:
        raise ConfigError(
            f"score.start_from={folder} was measured with another {differing[0] if differing else 'version'}; it can "
            "be continued with the same model, texts, seed, data.sequence_length and score.neurons only."
        )
    needed = {metric.pair[1] for metric in cfg.width if metric.pair}
    held = {agg for element, agg in running.states if not element.startswith("depth.")}
    if not needed <= held:
        raise ConfigError(f"score.start_from={folder} lacks what score.width={[m.name for m in cfg.width]} needs.")
    if running.samples > cfg.samples:
        raise ConfigError(
            f"score.samples={cfg.samples} is less than the {running.samples} of score.start_from={folder}; raise it."
        )
    return running


def measure_activations(
    run: Run, teacher: Chunks, dims: Dims, windows_NS: Tensor, running: Running, state: Path
) -> Running:
    """One forward pass over the samples not yet measured, for every width metric and block importance at once."""
    cfg = run.config.score
    if DepthMetric.bi not in cfg.depth and not any(metric.pair for metric in cfg.width):
        return running
    done, total = broadcast_object(running.samples), len(windows_NS)
    ranking: dict[str, Tensor] = running.rankings(dims, cfg) if is_main_rank() and done else {}
    with progress_bar("score", total - done, windows_NS.shape[1]) as advance:
        while done < total:
            part_NS = windows_NS[done : done + cfg.save_every]
            states = collect(teacher, run.mesh, dims, part_NS, cfg, advance)
            stop = False
            with main_rank_writes() as writes:
                if writes:
                    running.add(states, len(part_NS))
                    running.check_finite(dims)
                    before, ranking = ranking, running.rankings(dims, cfg)
                    stop = running.has_settled(before, ranking, cfg)
                    running.save(state / STATE)
            done += len(part_NS)
            if broadcast_object(stop):
                break
    return running
