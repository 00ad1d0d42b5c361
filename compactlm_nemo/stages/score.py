"""The score stage: calibration windows become importance scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.fingerprint import calibration_text, result_settings
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.score import DepthMetric, WidthMetric
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def score_settings(config: Config) -> dict[str, Any]:
    """Return what decides the scores; the tasks where layers are ranked by them."""
    tasks = {"evaluate": result_settings(config.evaluate)} if DepthMetric.tasks in config.score.depth else {}
    return {"score": result_settings(config.score)} | tasks | calibration_text(config)


def score_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return the broken rules between what is measured and what it is measured with."""
    score, problems = config.score, []
    if DepthMetric.tasks in score.depth and not config.evaluate.tasks:
        problems.append("score.depth=[tasks] needs evaluate.tasks; name lm-eval tasks, for example [winogrande].")
    problems += [
        f"score.data.{name} is no text of data.train, which has {', '.join(config.data.train)}; give it there as well."
        for name in score.data
        if name not in config.data.train
    ]
    if score.start_from is not None and (score.second_moments or WidthMetric.taylor in score.width):
        problems.append(
            "score.start_from continues activation metrics only; leave out score.second_moments and taylor."
        )
    return problems


def score(run: Run, folder: Path) -> dict[str, Any]:
    """Measure all scores of the teacher on calibration windows, and keep the statistics that they are made from."""
    import shutil

    from compactlm_nemo.artifacts import settings_of
    from compactlm_nemo.data.windows import calibration_windows
    from compactlm_nemo.importance.names import DEPTH
    from compactlm_nemo.importance.score_state import STATE
    from compactlm_nemo.importance.scores import FILE, Scores, save_scores
    from compactlm_nemo.parallel.collectives import broadcast_object
    from compactlm_nemo.parallel.devices import device
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.parallel.world import is_main_rank
    from compactlm_nemo.stages.score_depth import measure_layers
    from compactlm_nemo.stages.score_pass import Scoring, start_state, tokens_hash

    config, cfg, dims = run.config, run.config.score, run.dims("teacher")
    windows_NS = calibration_windows(
        run.calibration_corpora(), cfg.samples, config.data.sequence_length, config.run.seed
    )
    metadata = {
        "model": run.fingerprint("teacher"),
        "calibration": tokens_hash(windows_NS),
        "sequence_length": str(config.data.sequence_length),
        "mask_documents": str(config.data.mask_documents),
        "neurons": cfg.neurons.name,
    }
    is_per_rank = cfg.second_moments or WidthMetric.taylor in cfg.width  # then each rank keeps progress of its own
    layout = {"parallel": config.parallel} if is_per_rank else {}
    state = run.open_progress(
        settings_of(
            {"score": result_settings(cfg), "evaluate": result_settings(config.evaluate), "metadata": metadata} | layout
        )
    )
    teacher = run.load("teacher").eval()
    scoring = Scoring(run, teacher, dims, windows_NS.to(device()), start_state(run, state, windows_NS, metadata), state)
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


STAGE = Stage(
    name="score",
    summary="teacher and calibration windows -> `scores.safetensors`, on request second moments",
    reads=("teacher", "tokens"),
    writes="score",
    settings=score_settings,
    problems=score_problems,
    run=score,
)
