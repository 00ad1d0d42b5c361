"""What each verb does, in terms of the folders it reads and writes.

Every function takes the context of a run and the folder to write, and returns what its manifest should tell later
readers. All ranks call it; only the main rank writes plain files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compactlm_nemo.artifacts import atomic_write_text, read_manifest, settings_of
from compactlm_nemo.config.choices import WidthMetric
from compactlm_nemo.config.distill import deciding
from compactlm_nemo.config.schema import ScoreConfig
from compactlm_nemo.cutting import Cutting, validation_loss
from compactlm_nemo.data.tokens import (
    check_vocabulary,
    end_of_text,
    load_tokenizer,
    refuse_shared_documents,
    tokenize_corpus,
)
from compactlm_nemo.data.windows import calibration_windows, heldout_windows
from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.evaluation.harness import run_tasks
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.evaluation.speed import device_name, time_layers
from compactlm_nemo.importance.running import STATE, Running
from compactlm_nemo.importance.scores import DEPTH, FILE, Scores, load_scores, save_scores
from compactlm_nemo.layer_scoring import measure_layers
from compactlm_nemo.models import gguf
from compactlm_nemo.models.build import fill
from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf import copy_companions, count_params, export_hf
from compactlm_nemo.models.teacher import companions_folder, open_teacher
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.launch import device, is_main_rank, launch_world_size, main_rank_writes
from compactlm_nemo.pruning.plan import PLAN
from compactlm_nemo.pruning.spare import FILE as SPARE
from compactlm_nemo.report.progress import progress_bar
from compactlm_nemo.run import HF, Run, claim
from compactlm_nemo.scoring import Scoring
from compactlm_nemo.search.cost import num_params
from compactlm_nemo.search.damage import predicted_damage
from compactlm_nemo.search.latency import FILE as LATENCY
from compactlm_nemo.search.latency import LatencyTable
from compactlm_nemo.search.select import Candidate, candidates_json, rank_candidates
from compactlm_nemo.search.space import Budget, enumerate_space, within


def import_model(run: Run, folder: Path) -> dict[str, Any]:
    """Teacher of any kind -> checkpoint, `model.json`, and `hf/` with config and tokenizer."""
    teacher, converted = run.config.model, folder / "converted"
    if Path(teacher.source).suffix == ".gguf":
        with main_rank_writes() as writes:
            if writes:
                gguf.convert(Path(teacher.source), converted)
        teacher = replace(teacher, source=str(converted))
    dims, weights = open_teacher(teacher)
    with main_rank_writes() as writes:
        if writes:
            copy_companions(companions_folder(teacher), folder / HF)
    model = run.build(dims)
    fill(model, dims, run.mesh, weights, run.config.model.vocab_multiple)
    run.save(folder, model, dims)
    with main_rank_writes() as writes:
        if writes:
            shutil.rmtree(converted, ignore_errors=True)
    return {"params": num_params(dims)}


def tokenize(run: Run, folder: Path) -> dict[str, Any]:
    """Every corpus given as text -> Megatron token files; documents end with the tokenizer's end-of-text token."""
    counts: dict[str, int] = {}
    with main_rank_writes() as writes:
        if writes:
            tokenizer = load_tokenizer(run.dir / "teacher" / HF)
            check_vocabulary(tokenizer, run.dims("teacher").vocab_size)  # a GGUF file's is known only now
            end = end_of_text(run.dir / "teacher" / HF)
            refuse_shared_documents(run.config.data)
            for name, corpus in run.config.data.corpora().items():
                if run.token_prefix(name).parent == folder:
                    counts[name] = tokenize_corpus(Path(corpus.path), folder / name, tokenizer, end)
    return {"tokens": counts}


def score(run: Run, folder: Path) -> dict[str, Any]:
    """Teacher + calibration windows -> scores.safetensors, and the statistics it was made from."""
    config, cfg, dims = run.config, run.config.score, run.dims("teacher")
    windows_NS = calibration_windows(run.train_prefixes(), cfg.samples, config.data.sequence_length, config.run.seed)
    about = {
        "model": read_manifest(run.dir / "teacher")["fingerprint"],
        "calibration": tokens_hash(windows_NS),
        "sequence_length": str(config.data.sequence_length),
        "mask_documents": str(config.data.mask_documents),
        "neurons": cfg.neurons.name,
    }
    state = run.dir / "scoring"
    own = cfg.second_moments or WidthMetric.taylor in cfg.width  # then each rank keeps progress of its own
    layout = {"parallel": config.parallel} if own else {}
    claim(state, settings_of({"score": deciding(cfg), "evaluate": deciding(config.evaluate), "about": about} | layout))
    teacher = run.load("teacher").eval()
    scoring = Scoring(run, teacher, dims, windows_NS.to(device()), _start(run, state, windows_NS, about), state)
    scoring.measure_activations(folder)
    tensors = scoring.running.rankings(dims, cfg) if is_main_rank() else {}
    tensors |= {f"{DEPTH}.{name}": x.float() for name, x in measure_layers(scoring).items()}
    if WidthMetric.taylor in cfg.width:
        tensors |= {f"{WidthMetric.taylor.name}.{name}": x for name, x in scoring.taylor().items()}
    samples = broadcast_object(scoring.running.samples) or cfg.samples
    about |= {
        "samples": str(samples),
        "calibration": tokens_hash(windows_NS[:samples]),
        "width": ",".join(metric.name for metric in cfg.width),
        "depth": ",".join(metric.name for metric in cfg.depth),
    }
    with main_rank_writes() as writes:
        if writes:
            scoring.running.save(folder / STATE)
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
    if running.samples > cfg.samples:
        raise ConfigError(
            f"score.samples={cfg.samples} is less than the {running.samples} of score.start_from={folder}; raise it."
        )
    expected = about | {"calibration": tokens_hash(windows_NS[: running.samples])}
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


def search(run: Run, folder: Path) -> dict[str, Any]:
    """Scores + budgets -> candidates.json, best first."""
    dims, cfg = run.dims("teacher"), run.config.search
    found = enumerate_space(dims, cfg, run.config.parallel.tp)
    timed = _timed_layers(run, found, folder)
    if timed is not None and cfg.latency_ms is not None:
        found = within(found, [Budget("latency_ms", cfg.latency_ms, timed.milliseconds)])
    cutting = Cutting(run)
    is_predicted = cutting.moments is not None and len(found) > 1
    if is_predicted or run.config.prune.by_error:
        cutting.find_spare(folder)
    ranked = rank_candidates(dims, found, run.ranking(), cfg)
    if timed is not None:
        ranked = [replace(c, latency_ms=timed.milliseconds(c.dims(dims))) for c in ranked]
    if is_predicted:
        damage = predicted_damage(dims, run.ranking(), load_file(folder / SPARE))
        ranked = [replace(c, damage=damage(c.dims(dims))) for c in ranked]
        ranked.sort(key=lambda c: (c.damage, c.params))
    best = [replace(c, zero_shot=cutting.candidate_loss(c.dims(dims), folder)) for c in ranked[: cfg.top]]
    ranked[: len(best)] = sorted(best, key=lambda c: c.zero_shot or 0.0)
    with main_rank_writes() as writes:
        if writes:
            atomic_write_text(folder / "candidates.json", candidates_json(ranked))
    return {"candidates": len(ranked), "best": asdict(ranked[0])}


def _timed_layers(run: Run, found: list[Dims], folder: Path) -> LatencyTable | None:
    """Times of the layers of these candidates; None without a latency budget. What was timed is kept in `run.dir`."""
    cfg, layout = run.config.search, run.config.parallel
    if cfg.latency_ms is None:
        return None
    about = {
        "device": device_name(),
        "precision": run.config.model.precision.name,
        "batch": cfg.batch,
        "context": cfg.context,
        "model": read_manifest(run.dir / "teacher")["fingerprint"],
        "parallel": vars(layout) | {"world": launch_world_size()},
    }
    known = broadcast_object(LatencyTable.load(run.dir / LATENCY, about))
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


def prune(run: Run, folder: Path) -> dict[str, Any]:
    """Teacher + scores + one candidate -> student checkpoint; parameters planned and counted."""
    ranked = "rank/ranking.json" if run.config.rank.candidates else "search/candidates.json"
    candidates = json.loads((run.dir / ranked).read_text())
    chosen = run.config.prune.candidate
    if not 0 <= chosen < len(candidates):
        raise ConfigError(f"prune.candidate={chosen} must be in [0, {len(candidates)}), the number of candidates.")
    cutting = Cutting(run)
    teacher, student = cutting.teacher, Candidate(**candidates[chosen]).dims(cutting.teacher)
    plan = cutting.plan(student, run.dir / "search")
    before = validation_loss(run, run.load("teacher"), teacher, "teacher")
    model = cutting.student(student, plan)
    run.save(folder, model, student)
    with main_rank_writes() as writes:
        if writes:
            atomic_write_text(folder / PLAN, json.dumps(plan.to_json()) + "\n")
    return {
        "params": num_params(student),
        "teacher_params": num_params(teacher),
        "shape": candidates[chosen],
        "loss_before": before,
        "loss_after": validation_loss(run, model, student, "student"),
    }


def evaluate(run: Run, folder: Path) -> dict[str, Any]:
    """Held-out LM loss, size, forward speed and lm-eval tasks of teacher, pruned and distilled model."""
    trained = read_manifest(run.dir / "distill")["results"]["tokens"]
    models = (("teacher", "teacher", 0), ("pruned", "student", 0), ("distilled", "distill", trained))
    rows = [
        {"model": label, "params": num_params(run.dims(stage)), "tokens_trained": tokens}
        | _heldout_losses(run, label, stage)
        for label, stage, tokens in models
    ]
    with main_rank_writes() as writes:
        if writes:
            for row, (_, stage, _) in zip(rows, models, strict=True):
                row |= _task_results(run, stage, folder / "as_hf")
            atomic_write_text(folder / "results.json", json.dumps(rows, indent=2) + "\n")
    return {"recovered": {name: _recovered(rows, f"loss_{name}") for name in run.config.data.heldout}}


def _heldout_losses(run: Run, label: str, stage: str) -> dict[str, float]:
    """LM loss on each held-out text and the best forward speed seen."""
    config, dims, model = run.config, run.dims(stage), run.load(stage)
    row: dict[str, float] = {}
    speeds = []
    for name in config.data.heldout:
        prefix = run.token_prefix(f"heldout.{name}")
        windows = heldout_windows(prefix, config.data.sequence_length, config.evaluate.tokens).to(device())
        with progress_bar(f"evaluate {label} on {name}", len(windows), config.data.sequence_length) as advance:
            result = evaluate_lm_loss(
                model,
                dims,
                run.mesh,
                windows,
                micro_batch=config.evaluate.micro_batch,
                chunk_tokens=run.chunk_tokens(dims),
                progress=advance,
            )
        row |= {f"loss_{name}": result.loss_nats, f"tokens_{name}": result.tokens}
        speeds.append(result.tokens_per_second)
    return row | {"forward_tokens_per_second": max(speeds)}


def _task_results(run: Run, stage: str, scratch: Path) -> dict[str, float]:
    """lm-eval results of a stage's model, exported for the purpose; none without tasks."""
    if not run.config.evaluate.tasks:
        return {}
    dims = run.dims(stage)
    export_hf(run.dir / "teacher" / HF, scratch, dims, CheckpointSource(run.dir / stage, dims), run.dtype)
    values = run_tasks(scratch, run.config.evaluate)
    shutil.rmtree(scratch)
    return {f"task_{name}": value for name, value in values.items()}


def _recovered(rows: list[dict[str, Any]], key: str) -> float | None:
    """Share of the loss gap between teacher and pruned model that distillation closed; None without a gap."""
    teacher, pruned, distilled = (row[key] for row in rows)
    return None if pruned == teacher else (pruned - distilled) / (pruned - teacher)


def export(run: Run, folder: Path) -> dict[str, Any]:
    """Distilled student -> Hugging Face folder `export/hf`; its parameters, counted in the files, equal the plan."""
    dims = run.dims("distill")
    target = folder / HF
    with main_rank_writes() as writes:
        if writes:
            source = CheckpointSource(run.dir / "distill", dims)
            export_hf(run.dir / "teacher" / HF, target, dims, source, run.dtype)
    counted = count_params(target)
    if counted != num_params(dims):
        raise CheckpointError(f"{target} holds {counted} parameters, the plan says {num_params(dims)}.")
    return {"params": counted, "folder": str(target)}
