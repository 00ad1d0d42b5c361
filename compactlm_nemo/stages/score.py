"""The score stage: calibration windows become importance scores."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from compactlm_nemo.artifacts import read_manifest, settings_of
from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.score import DepthMetric, ScoreConfig, WidthMetric
from compactlm_nemo.data.windows import calibration_windows
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.importance.names import DEPTH
from compactlm_nemo.importance.score_state import STATE, ScoreState
from compactlm_nemo.importance.scores import FILE, Scores, load_scores, save_scores
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.launch import is_main_rank, main_rank_writes
from compactlm_nemo.stages.context import Run, open_progress
from compactlm_nemo.stages.score_depth import measure_layers
from compactlm_nemo.stages.score_pass import Scoring


def _score_problems(config: Config) -> list[str]:
    score = config.score
    problems = []
    if DepthMetric.tasks in score.depth and not config.evaluate.tasks:
        problems.append("score.depth=[tasks] needs evaluate.tasks; name lm-eval tasks, for example [winogrande].")
    if score.start_from is not None and (score.second_moments or WidthMetric.taylor in score.width):
        problems.append(
            "score.start_from continues activation metrics only; leave out score.second_moments and taylor."
        )
    for name, held, chosen in (
        ("width", score.width, config.search.width),
        ("depth", score.depth, config.search.depth),
    ):
        if chosen is not None and chosen not in held:
            names = [metric.name for metric in held]
            problems.append(
                f"search.{name}={chosen.name} must be one of the metrics measured, {names}; add it to score.{name}."
            )
    return problems


def score(run: Run, folder: Path) -> dict[str, Any]:
    """Score the teacher on calibration windows: scores.safetensors, and the state that the scores were made from."""
    config, cfg, dims = run.config, run.config.score, run.dims("teacher")
    windows_NS = calibration_windows(run.train_prefixes(), cfg.samples, config.data.sequence_length, config.run.seed)
    metadata = {
        "model": read_manifest(run.dir / "teacher")["fingerprint"],
        "calibration": tokens_hash(windows_NS),
        "sequence_length": str(config.data.sequence_length),
        "mask_documents": str(config.data.mask_documents),
        "neurons": cfg.neurons.name,
    }
    state = run.dir / "scoring"
    own = cfg.second_moments or WidthMetric.taylor in cfg.width  # then each rank keeps progress of its own
    layout = {"parallel": config.parallel} if own else {}
    open_progress(
        state,
        settings_of(
            {"score": result_settings(cfg), "evaluate": result_settings(config.evaluate), "metadata": metadata} | layout
        ),
    )
    teacher = run.load("teacher").eval()
    scoring = Scoring(run, teacher, dims, windows_NS.to(device()), _start(run, state, windows_NS, metadata), state)
    scoring.measure_activations(folder)
    tensors = scoring.running.rankings(dims, cfg) if is_main_rank() else {}
    tensors |= {f"{DEPTH}.{name}": x.float() for name, x in measure_layers(scoring).items()}
    if WidthMetric.taylor in cfg.width:
        tensors |= {f"{WidthMetric.taylor.name}.{name}": x for name, x in scoring.taylor().items()}
    samples = broadcast_object(scoring.running.samples) or cfg.samples
    metadata |= {
        "samples": str(samples),
        "calibration": tokens_hash(windows_NS[:samples]),
        "width": ",".join(metric.name for metric in cfg.width),
        "depth": ",".join(metric.name for metric in cfg.depth),
    }
    with main_rank_writes() as writes:
        if writes:
            scoring.running.save(folder / STATE)
            save_scores(folder / FILE, Scores(tensors, metadata))
            shutil.rmtree(state)
    return {"samples": samples, "tokens": samples * config.data.sequence_length, "calibration": metadata["calibration"]}


def tokens_hash(windows_NS: Tensor) -> str:
    """SHA-256 of the calibration tokens as little-endian int64, sample after sample."""
    return hashlib.sha256(windows_NS.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _start(run: Run, state: Path, windows_NS: Tensor, metadata: dict[str, str]) -> ScoreState:
    """The state to go on from: that of an interrupted run, or of `score.start_from`; on the main rank."""
    running = ScoreState()
    with main_rank_writes() as writes:
        if writes:
            running = ScoreState.load(state / STATE)
            if not running.samples and run.config.score.start_from is not None:
                running = _finished(Path(run.config.score.start_from), run.config.score, windows_NS, metadata)
    return running


def _finished(folder: Path, cfg: ScoreConfig, windows_NS: Tensor, metadata: dict[str, str]) -> ScoreState:
    """The state of a finished stage, after a check that the state is of the first of these windows."""
    old = load_scores(folder).metadata
    running = ScoreState.load(folder / STATE)
    if running.samples > cfg.samples:
        raise ConfigError(
            f"score.samples={cfg.samples} is less than the {running.samples} of score.start_from={folder}; raise it."
        )
    expected = metadata | {"calibration": tokens_hash(windows_NS[: running.samples])}
    differing = [name for name in expected if old.get(name) != expected[name]]
    if differing or not running.samples:
        raise ConfigError(
            f"score.start_from={folder} was measured with another {differing[0] if differing else 'version'}; it can "
            "be continued with the same model, texts, seed, sequence_length, mask_documents and score.neurons only."
        )
    needed = {metric.pair[1] for metric in cfg.width if metric.pair}
    held = {agg for element, agg in running.states if not element.startswith("depth.")}
    if not needed <= held:
        raise ConfigError(f"score.start_from={folder} lacks what score.width={[m.name for m in cfg.width]} needs.")
    return running
