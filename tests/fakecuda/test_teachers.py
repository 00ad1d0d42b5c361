"""Every source of targets, and every loss, in a step at full width on the device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compactlm_nemo.config.distill import Recompute
from compactlm_nemo.config.loss import HiddenConfig, LossConfig, Projection, StateLoss
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.distill.heldout_kl import evaluate_kd_loss
from compactlm_nemo.distill.hidden_states import HiddenStateLoss
from compactlm_nemo.distill.layer_pairs import StatePlace, layer_pairs
from compactlm_nemo.distill.projections import Projections
from compactlm_nemo.distill.stored_targets import (
    METADATA,
    StoredTargets,
    TopKRecord,
    encode_hidden,
    encode_top_k,
    write_shard,
)
from compactlm_nemo.distill.teacher import LiveTeacher, NoTeacher, OwnMeshTeacher, StoredHidden, StoredTopK
from compactlm_nemo.distill.teacher_correction import TeacherCorrection
from compactlm_nemo.parallel.launch import second_mesh
from tests.fakecuda.cluster import Gathered, cluster, skip_without_fake_cuda
from tests.fakecuda.experiment import (
    NoCheckpoints,
    distillation_step,
    model_of,
    shapes,
    train,
    training_settings,
)
from tests.fakecuda.listed import HELD_OUT, HIDDEN_LOSS, STEP, unlisted

skip_without_fake_cuda()

LENGTH, K, SAMPLES = 256, 64, 32
ALL_LOSSES = LossConfig(forward_kl=1.0, reverse_kl=0.5, jsd=0.5, skewed_kl=0.5, mse=0.1, cosine=0.1, cross_entropy=1.0)
MESHES: list[dict[str, Any]] = [{"world": 8}, {"world": 8, "tp": 4, "sequence_parallel": True}, {"world": 8, "cp": 2}]


@pytest.mark.parametrize("layout", MESHES)
def test_every_loss_runs_on_the_device(layout: dict[str, Any]) -> None:
    with cluster(**layout) as there:
        distillation_step(there, dims={"layers": 1}, length=LENGTH, loss=ALL_LOSSES, temperature=2.0)
    assert not unlisted(there.counts, STEP)


@pytest.mark.parametrize("layout", MESHES)
def test_a_student_learns_without_a_teacher(layout: dict[str, Any]) -> None:
    only_text = LossConfig(forward_kl=0.0, cross_entropy=1.0)
    with cluster(**layout) as there:
        distillation_step(
            there, teacher=lambda _: NoTeacher(there.mesh), dims={"layers": 1}, length=LENGTH, loss=only_text
        )
    assert not unlisted(there.counts, STEP)


def _stored(folder: Path, kind: str, width: int) -> StoredTargets:
    """Write targets of SAMPLES samples, one shard."""
    if kind == "top_k":
        ids_TK = torch.arange(K).expand(LENGTH, K)
        probs_TK = torch.full((LENGTH, K), 0.5 / K)
        record = encode_top_k(TopKRecord(ids_TK, probs_TK, torch.full((LENGTH,), 0.5), torch.ones(LENGTH)))
    else:
        record = encode_hidden(torch.zeros(LENGTH, width, dtype=torch.bfloat16))
    write_shard(folder, 0, [record] * SAMPLES)
    metadata = {"k": K, "samples": SAMPLES, "shard_samples": SAMPLES, "sequence_length": LENGTH}
    (folder / METADATA).write_text(json.dumps(metadata))
    return StoredTargets(folder)


@pytest.mark.parametrize("layout", MESHES)
@pytest.mark.parametrize("kind", ["top_k", "hidden"])
def test_stored_targets_are_queued_to_the_device(tmp_path: Path, kind: str, layout: dict[str, Any]) -> None:
    with cluster(**layout) as there:
        teacher_dims, student_dims = shapes(there.mesh, layers=1)
        store = _stored(tmp_path, kind, teacher_dims.hidden_size)
        rows = teacher_dims.padded_vocab(there.mesh.tp_size, 128) // there.mesh.tp_size
        head = torch.zeros(rows, teacher_dims.hidden_size, dtype=torch.bfloat16, device="cuda")
        teacher = StoredTopK(store, there.mesh) if kind == "top_k" else StoredHidden(store, there.mesh, head)
        train(there, model_of(student_dims, there.mesh), teacher, length=LENGTH)
    assert not unlisted(there.counts, STEP)


def _two_meshes(world: int, teacher: dict[str, int], student: dict[str, int]) -> Gathered:
    """Answer what each rank computes and compares: ranks run through tensor, then data, then pipeline parallelism."""

    def place(rank: int, tp: int = 1, pp: int = 1) -> tuple[int, int, bool]:
        dp = world // tp // pp
        return rank % tp, rank // tp % dp, rank // tp // dp == pp - 1

    def both(rank: int) -> tuple[int | None, int | None]:
        tp_rank, teacher_dp_rank, computes = place(rank, **teacher)
        _, student_dp_rank, compares = place(rank, **student)
        return teacher_dp_rank if computes and tp_rank == 0 else None, student_dp_rank if compares else None

    is_asked_for = lambda obj: isinstance(obj, tuple) and len(obj) == 2  # noqa: E731  Megatron gathers objects too
    return lambda obj: [both(rank) if is_asked_for(obj) else obj for rank in range(world)]


@pytest.mark.parametrize("own", [{"tp": 4}, {"tp": 2, "pp": 2}])
@pytest.mark.parametrize("rank", [0, 7])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_teacher_on_a_mesh_of_its_own_runs_on_the_device(tp: int, rank: int, own: dict[str, Any]) -> None:
    gathered = _two_meshes(8, own, {"tp": tp})
    with cluster(world=8, rank=rank, tp=tp, sequence_parallel=tp > 1, gathered=gathered) as there:
        teacher_dims, student_dims = shapes(there.mesh, layers=2)
        own_mesh = second_mesh(ParallelConfig(**own), seed=1)
        with own_mesh.active():
            chunks = model_of(teacher_dims, own_mesh)
        rows = teacher_dims.padded_vocab(there.mesh.tp_size, 128) // there.mesh.tp_size
        head = torch.zeros(rows, teacher_dims.hidden_size, dtype=torch.bfloat16, device="cuda")
        teacher = OwnMeshTeacher(chunks, there.mesh, head)
        train(there, model_of(student_dims, there.mesh), teacher, length=LENGTH)
    assert not unlisted(there.counts, STEP)


def _both_stages() -> Gathered:
    """Answer for two pipeline stages of two layers each: the other stage has the places that this one has not."""
    kinds = ("attention", "mlp_input", "layers")
    every = [StatePlace("embedding", 0), *(StatePlace(kind, layer) for kind in kinds for layer in range(4))]

    def gathered(obj: Any) -> list[Any]:
        if not (isinstance(obj, tuple) and len(obj) == 3):
            return [obj, obj]
        stage, teacher, student = obj
        other = (1 - stage, [p for p in every if p not in teacher], [p for p in every if p not in student])
        return [obj, other] if stage == 0 else [other, obj]

    return gathered


HIDDEN_MESHES: dict[str, dict[str, Any]] = {
    "tp1": {"world": 8},
    "tp4_sp": {"world": 8, "tp": 4, "sequence_parallel": True},
    "cp2": {"world": 8, "cp": 2},
    "pp2_first": {"world": 2, "pp": 2},
    "pp2_last": {"world": 2, "pp": 2, "rank": 1},
}


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("layout", HIDDEN_MESHES)
def test_losses_between_hidden_states_run_on_the_device(layout: str, recompute: Recompute) -> None:
    cfg = HiddenConfig(
        layers=[[-2, -2], [-1, -1]], attention=[[0, 0]], mlp_input=[[1, 1]], embedding=True,
        loss=StateLoss.cosine if recompute is Recompute.full else StateLoss.mse, projection=Projection.per_pair,
    )  # fmt: skip
    mesh = HIDDEN_MESHES[layout]
    gathered = _both_stages() if "pp" in mesh else None
    with cluster(**mesh, gathered=gathered) as there:
        teacher_dims, student_dims = shapes(there.mesh, layers=2)
        teacher, student = (model_of(dims, there.mesh) for dims in (teacher_dims, student_dims))
        pairs = layer_pairs(cfg, teacher_dims, student_dims)
        start_GH = torch.zeros(teacher_dims.hidden_size, student_dims.hidden_size, device="cuda")
        projections = Projections(len(pairs), False, start_GH, training_settings())
        loss = HiddenStateLoss(cfg, pairs, teacher, student, projections)
        live = LiveTeacher(teacher, loss.before_teacher_micro_batch)
        train(there, student, live, callbacks=[loss], length=LENGTH, recompute=recompute, hidden=cfg)
    assert not unlisted(there.counts, [*HIDDEN_LOSS, *STEP[1:]])


def test_a_teacher_that_is_corrected_while_it_teaches_is_on_the_device() -> None:
    with cluster(world=8) as there:
        teacher, student = (model_of(dims, there.mesh) for dims in shapes(there.mesh, layers=1))
        cfg = replace(training_settings(), loss=LossConfig(forward_kl=0.0, cross_entropy=1.0), steps=4, warmup_steps=0)
        correction = TeacherCorrection(teacher, cfg, checkpoints=NoCheckpoints())
        train(there, student, LiveTeacher(teacher), callbacks=[correction], length=LENGTH)
    twice = [line._replace(most=line.most and 2 * line.most) for line in STEP]
    assert not unlisted(there.counts, twice)


@pytest.mark.parametrize("layout", MESHES)
def test_held_out_losses_wait_once_a_group_of_batches(layout: dict[str, Any]) -> None:
    with cluster(**layout) as there:
        teacher, student = (model_of(dims, there.mesh) for dims in shapes(there.mesh, layers=1))
        windows_NT = torch.zeros(3 * there.mesh.dp_size - 1, LENGTH + 1, dtype=torch.long).cuda()
        there.counts.clear()
        evaluate_kd_loss(student, LiveTeacher(teacher), windows_NT, micro_batch=1)
    assert not unlisted(there.counts, STEP[:1] + HELD_OUT)
