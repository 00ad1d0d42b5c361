"""The training of a model on the run's mesh, which the stages `distill` and `correct_teacher` share.

Training state lives in `progress/STAGE`, so a killed run goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from compactlm_nemo.artifacts import MANIFEST, file_identity, read_manifest, refuse_damage, settings_of
from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.config.fingerprint import correction_settings, result_settings, training_text
from compactlm_nemo.config.hardware import can_compile
from compactlm_nemo.config.loss import Projection
from compactlm_nemo.config.teacher import StoredKind, TeacherSource
from compactlm_nemo.data.windows import Windows
from compactlm_nemo.distill.heldout_kl import evaluate_kd_loss
from compactlm_nemo.distill.hidden_states import HiddenStateLoss
from compactlm_nemo.distill.layer_pairs import layer_pairs
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.projections import Projections
from compactlm_nemo.distill.stored_targets import StoredTargets
from compactlm_nemo.distill.teacher import LiveTeacher, NoTeacher, OwnMeshTeacher, StoredHidden, StoredTopK, Teacher
from compactlm_nemo.distill.teacher_correction import TeacherCorrection
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.models.build import ModelChunks, tp_share
from compactlm_nemo.models.checkpoint import CheckpointSource, load_model
from compactlm_nemo.models.compile import compile_layers, compiling_nothing
from compactlm_nemo.models.dims import MODEL, Dims
from compactlm_nemo.models.experts import can_group, group_experts
from compactlm_nemo.parallel.collectives import all_gather_objects
from compactlm_nemo.parallel.devices import device, device_name, peak_tflops
from compactlm_nemo.parallel.hang import watched
from compactlm_nemo.parallel.interruption import interrupted
from compactlm_nemo.parallel.launch import main_rank_writes, second_mesh
from compactlm_nemo.parallel.shared_files import shared_file_problems
from compactlm_nemo.parallel.world import is_main_rank, launch_world_size
from compactlm_nemo.pruning.plan import PLAN, Plan
from compactlm_nemo.search.cost import flops_per_token_forward
from compactlm_nemo.stages.context import Run, validation_loss
from compactlm_nemo.training.best_weights import EVAL_LOSS, BestWeights
from compactlm_nemo.training.callbacks import Callback, MetricsLog, PeakMemory, Speed, StopAfter, StopWhenAsked
from compactlm_nemo.training.checkpoint import Checkpoints
from compactlm_nemo.training.fusions import available_fusions, fusions_text
from compactlm_nemo.training.planned_memory import planned_bytes
from compactlm_nemo.training.saving_time import SavingTime, saving_text
from compactlm_nemo.training.stability import LossSpikes, NonFiniteSteps
from compactlm_nemo.training.tracker import METRICS, Tracker


def train(run: Run, folder: Path, cfg: DistillConfig, *, source: str) -> dict[str, Any] | None:
    """Train the model of artifact `source`, as `cfg` says; None when that ends before the last step."""
    config = run.config
    state = run.open_progress(
        settings_of(
            {"distill": result_settings(cfg), source: run.fingerprint(source)}
            | training_text(config)
            | _teaching(run, cfg)
            | correction_settings(config)
            | ({"start_from": file_identity(Path(cfg.start_from) / MANIFEST)} if cfg.start_from is not None else {})
        )
    )
    dims = run.dims(source)
    samples = Windows(run.train_corpora(), config.data.sequence_length, config.run.seed)
    student = run.load(source)
    tokens_seen = _load_start(student, cfg)
    first_sample = tokens_seen // config.data.sequence_length
    checkpoints = _checkpoints(state / "checkpoints", cfg, keep=cfg.keep_checkpoints)
    checkpoints.drop_damaged(*_teacher_checkpoints(run, state))
    fusions = fusions_text(available_fusions(is_cuda=torch.cuda.is_available()))
    Console(quiet=not is_main_rank()).print(f"  fusions: {fusions}")
    start, shown = checkpoints.latest_step() or 0, settings_of(asdict(config))
    wandb = config.wandb.named(config.run.dir, job_type=state.name)
    with (
        closing(_teacher(run, cfg)) as teacher,
        Tracker(state, wandb, shown, is_main_rank(), cfg.steps, start_step=start, log_every=cfg.log_every) as tracker,
    ):
        for chunks in [student, *([teacher.chunks] if isinstance(teacher, (LiveTeacher, OwnMeshTeacher)) else [])]:
            prepare_layers(run, cfg, chunks)
        best_weights = BestWeights(
            _heldout_metrics(run, student, teacher),
            every=cfg.eval_every, num_steps=cfg.steps, result=cfg.result, checkpoints=checkpoints,
        )  # fmt: skip
        callbacks = [
            StopAfter(cfg.stop_after),
            asked := StopWhenAsked(cfg.checkpoint_minutes),
            LossSpikes(cfg.spike_factor, cfg.spike_limit),
            NonFiniteSteps(cfg.skip_limit),
            *_hidden_state_loss(run, cfg, student, teacher),
            *_teacher_correction(run, teacher, state),
            Speed(_speed(run, dims, cfg)),
            best_weights,
            saving_time := SavingTime(checkpoints),
            PeakMemory(planned_bytes(config, state.name, launch_world_size())),
            MetricsLog(tracker.log, every=cfg.log_every, rewind=tracker.rewind),
        ]
        with watched(state.parents[1], config.run.hang_minutes, all_gather_objects(socket.gethostname())):
            end = distill(
                student, teacher, lambda i: samples.sample(first_sample + i), cfg, callbacks, checkpoints=checkpoints
            )
    Console(quiet=not is_main_rank()).print(f"  {saving_text(**(times := saving_time.totals()))}")
    if end.step < cfg.steps:
        if asked.number:
            raise interrupted(asked.number, f"{end.step} of {cfg.steps} steps are saved in {checkpoints.folder}")
        return None
    run.save(folder, student, if_not_finite="lower the learning rate")
    with main_rank_writes() as writes:
        if writes:
            shutil.copyfile(state / METRICS, folder / METRICS)
    with compiling_nothing():
        loss = validation_loss(run, student, source)
    return {
        "tokens": tokens_seen + cfg.num_samples * config.data.sequence_length,
        "best_step": best_weights.best_step,
        "fusions": fusions,
        "loss": loss,
    } | times


def _load_start(student: ModelChunks, cfg: DistillConfig) -> int:
    """Load the student of `distill.start_from`, if that is set; return the tokens that the student was trained on."""
    if cfg.start_from is None:
        return 0
    folder = Path(cfg.start_from)
    manifest = read_manifest(folder)
    refuse_damage(folder, shared_file_problems(folder, manifest["outputs"]))
    if Dims.load(folder / MODEL) != student.dims:
        raise ConfigError(
            f"distill.start_from={folder} has a student of another shape than the pruned one; give prune that shape."
        )
    load_model(folder, student)
    tokens: int = manifest["results"]["tokens"]
    return tokens


def prepare_layers(run: Run, cfg: DistillConfig, chunks: ModelChunks) -> None:
    """Group the experts of a model that trains or teaches and compile its layers, where settings and device allow."""
    if can_group(chunks, device()):
        group_experts(chunks)
    if _compiles(run, cfg):
        compile_layers(chunks)


def _compiles(run: Run, cfg: DistillConfig) -> bool:
    """Whether the layers are compiled for this training; hooks into them would end the graphs."""
    if cfg.hidden.is_on:
        return False
    wanted = run.config.model.compile
    return can_compile() and device().type == "cuda" if wanted is None else wanted


def _teaching(run: Run, cfg: DistillConfig) -> dict[str, str]:
    """Return which artifact teaches the student; nothing where none does."""
    artifact = {TeacherSource.live: run.teaching_artifact, TeacherSource.stored: "targets"}.get(cfg.teacher)
    return {"taught by": run.fingerprint(artifact)} if artifact else {}


def _teacher(run: Run, cfg: DistillConfig) -> Teacher:
    """Return the source of the student's targets: a live teacher, stored targets, or the labels alone."""
    if cfg.teacher is TeacherSource.none:
        return NoTeacher(run.mesh)
    if cfg.teacher is TeacherSource.live:
        layout = run.config.teacher_parallel
        if layout == run.mesh.layout:
            return LiveTeacher(run.load(run.teaching_artifact))
        teacher_mesh = second_mesh(layout, run.config.run.seed)
        with teacher_mesh.active():
            chunks = replace(run, mesh=teacher_mesh).load(run.teaching_artifact)
        return OwnMeshTeacher(chunks, run.mesh, _head(run) if run.mesh.is_last_stage else None)
    store = StoredTargets(run.path("targets"))
    if run.config.cache.kind is StoredKind.top_k:
        return StoredTopK(store, run.mesh)
    return StoredHidden(store, run.mesh, _head(run) if run.mesh.is_last_stage else None)


def _teacher_correction(run: Run, teacher: Teacher, state: Path) -> list[Callback]:
    """Return teacher correction while distilling, if it is on; correct_teacher itself has no live teacher."""
    if not run.config.correct.while_distilling or not isinstance(teacher, LiveTeacher):
        return []
    (checkpoints,) = _teacher_checkpoints(run, state)
    return [TeacherCorrection(teacher.chunks, run.config.correction, checkpoints=checkpoints)]


def _teacher_checkpoints(run: Run, state: Path) -> list[Checkpoints]:
    """Return the checkpoints of a teacher that is trained while it teaches, none of another."""
    if not run.config.correct.while_distilling or run.stage.name != "distill":
        return []
    cfg = run.config.correction
    return [_checkpoints(state / "teacher", cfg, keep=cfg.keep_checkpoints + 1)]


def _checkpoints(folder: Path, cfg: DistillConfig, *, keep: int) -> Checkpoints:
    in_background = device().type == "cuda" if cfg.checkpoint_async is None else cfg.checkpoint_async
    return Checkpoints(folder, keep=keep, is_main=is_main_rank(), in_background=in_background)


def _hidden_state_loss(run: Run, cfg: DistillConfig, student: ModelChunks, teacher: Teacher) -> list[Callback]:
    """Return the losses between hidden states, if they are on.

    Projections start as the cut reversed: channel j of the student goes to the channel of the teacher that it was.
    """
    if not cfg.hidden.is_on:
        return []
    assert isinstance(teacher, LiveTeacher)  # settings are checked before the start
    dims, student_dims = run.dims("teacher"), run.dims("student")
    pairs, projections = layer_pairs(cfg.hidden, dims, student_dims), None
    if cfg.hidden.projection is not Projection.none:
        channels = Plan.from_json(json.loads((run.path("student") / PLAN).read_text())).hidden
        start_GH = torch.eye(dims.hidden_size, device=device())[:, channels.to(device())]
        projections = Projections(len(pairs), cfg.hidden.projection is Projection.shared, start_GH, cfg)
    loss = HiddenStateLoss(cfg.hidden, pairs, teacher.chunks, student, projections)
    teacher.on_input = loss.before_teacher_micro_batch
    return [loss]


def _head(run: Run) -> Tensor:
    """Return this rank's rows of the teacher's output weights, read without the rest of the teacher."""
    dims, mesh = run.dims("teacher"), run.mesh
    name = "embedding.word_embeddings.weight" if dims.tied_embeddings else "output_layer.weight"
    padded = dims.padded_vocab(mesh.tp_size, run.config.model.vocab_multiple)
    whole = CheckpointSource(run.path(run.teaching_artifact), dims)(name)
    shard = tp_share(name, whole, rank=mesh.tp_rank, size=mesh.tp_size, gated=dims.gated_mlp, padded_vocab=padded)
    return shard.to(device(), run.dtype)


def _heldout_metrics(run: Run, student: ModelChunks, teacher: Teacher) -> Callable[[], dict[str, float]]:
    """Return a function that measures the student's LM loss and, with a live teacher, KL on each held-out text."""
    config = run.config
    micro_batch = config.evaluate.micro_batch

    def measure() -> dict[str, float]:
        values: dict[str, float] = {}
        for name in config.data.heldout:
            windows = run.heldout_windows(name, config.distill.eval_tokens)
            if isinstance(teacher, (LiveTeacher, OwnMeshTeacher)):
                got = evaluate_kd_loss(student, teacher, windows, micro_batch=micro_batch)
                values |= {f"eval/{name}_lm_loss_nats": got.lm_loss, f"eval/{name}_kl_nats": got.kl}
                values |= {f"eval/{name}_kl_nats_from_{first}": kl for first, kl in got.kl_from.items()}
            else:
                loss = evaluate_lm_loss(student, windows, micro_batch=micro_batch, progress=lambda samples: None)
                values[f"eval/{name}_lm_loss_nats"] = loss.loss_nats
        return values | {EVAL_LOSS: sum(v for k, v in values.items() if "lm_loss" in k) / len(config.data.heldout)}

    def measure_as_compiled() -> dict[str, float]:
        with compiling_nothing():
            return measure()

    return measure_as_compiled


def _speed(run: Run, student: Dims, cfg: DistillConfig) -> Callable[[float], dict[str, float]]:
    """Return a function from a step's seconds to tokens a second, model FLOPs, and their share of the peak.

    A training step is three forward passes of the student (backward is two) and one of a live teacher; what
    recomputation adds is not counted.
    """
    length = run.config.data.sequence_length
    tokens = cfg.global_batch * length  # all of them are work, whether their prediction counts or not
    flops = 3 * flops_per_token_forward(student, length)
    if cfg.teacher is TeacherSource.live:
        flops += flops_per_token_forward(run.dims("teacher"), length)
    peak = cfg.peak_tflops or peak_tflops(device_name())

    def measure(seconds: float) -> dict[str, float]:
        achieved = tokens * flops / seconds / launch_world_size() / 1e12
        utilisation = {"perf/mfu": achieved / peak} if peak else {}
        return {"perf/tokens_per_second": tokens / seconds, "perf/tflops_per_device": achieved} | utilisation

    return measure
