"""Stopping and resuming changes nothing: on the same layout bit for bit, on another one up to rounding."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.teacher import LiveTeacher
from compactlm_nemo.models.build import global_names
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training import optimizer
from compactlm_nemo.training.best_weights import EVAL_LOSS, BestWeights
from compactlm_nemo.training.callbacks import MetricsLog, StopAfter
from compactlm_nemo.training.checkpoint import Checkpoints
from compactlm_nemo.training.stability import LossSpikes, NonFiniteSteps
from tests.support.meshes import LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

CASE = "llama_tied_llama3_rope"
STUDENT = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
CONFIG = DistillConfig(steps=5, global_batch=4, micro_batch=1, lr=1e-2, min_lr=1e-3, warmup_steps=2, checkpoint_every=2)
STOP = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Metrics = dict[int, dict[str, float]]


def sample(idx: int) -> Tensor:
    return torch.randint(0, VOCAB, (13,), generator=torch.Generator().manual_seed(idx))


def train(
    root: Path,
    mesh: Mesh,
    folder: Path,
    rank: int,
    stop_after: int | None,
    dtype: torch.dtype = torch.float32,
    cfg: DistillConfig = CONFIG,
) -> tuple[dict[str, Tensor], Metrics]:
    """Weights after training a fresh model from the newest checkpoint, and the metrics of the steps done here."""
    _, student = filled(root / "student", mesh, dtype=dtype)
    dims, teacher = filled(root / "teacher", mesh, dtype=dtype)
    seen: Metrics = {}

    def evaluate() -> dict[str, float]:
        return {EVAL_LOSS: float(sum(x.detach().double().square().sum() for x in student.parameters()))}

    checkpoints = Checkpoints(folder, keep=cfg.keep_checkpoints, is_main=rank == 0)
    callbacks = [
        StopAfter(stop_after),
        LossSpikes(cfg.spike_factor, cfg.spike_limit),
        NonFiniteSteps(cfg.skip_limit),
        BestWeights(evaluate, every=cfg.eval_every, num_steps=cfg.steps, result=cfg.result, checkpoints=checkpoints),
        MetricsLog(lambda step, values: seen.update({step: values}), every=cfg.log_every),
    ]
    finished = distill(student, LiveTeacher(teacher), sample, cfg, callbacks, checkpoints=checkpoints)
    assert finished.step == (stop_after or CONFIG.steps)
    weights = {name: value.detach().clone() for name, value in global_names(student)}
    return weights, seen


def _one_rank(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    for name, dtype in DTYPES.items():
        want, metrics = train(root, mesh, root / name / "whole", rank, None, dtype)
        _, before = train(root, mesh, root / name / "stopped", rank, STOP, dtype)
        assert sorted(before) == list(range(STOP))
        assert not train(root, mesh, root / name / "stopped", rank, STOP, dtype)[1]  # it has stopped there
        shutil.copytree(root / name / "stopped", root / name / "at_stop")
        got, after = train(root, mesh, root / name / "stopped", rank, None, dtype)
        assert sorted(after) == list(range(STOP, CONFIG.steps))
        assert before | after == metrics, name
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name
        # The run is one where a forgotten moment, learning rate or sample would show.
        assert metrics[0]["train/lr"] != metrics[3]["train/lr"]
        assert len({m["train/loss"] for m in metrics.values()}) == CONFIG.steps
        torch.save(metrics, root / name / "metrics.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and the results of one rank, with a checkpoint of `STOP` steps in `at_stop`."""
    root = tmp_path_factory.mktemp("resume")
    save_tiny(CASE, root / "teacher")
    save_tiny(CASE, root / "student", **STUDENT)
    run_ranks(_one_rank, 1, root, root)
    return root


def test_resuming_equals_not_stopping(root):
    kept = sorted(path.name for path in (root / "fp32" / "whole").glob("step_*"))
    assert kept == ["step_0000004", "step_0000005"]  # the newest keep_checkpoints


def _stale(rank: int, world: int, root: Path, checkpoints: Path) -> None:
    (checkpoints / "step_0000009").mkdir(parents=True)
    train(root, mesh_of(), checkpoints, rank, STOP)


def test_what_a_killed_run_left_of_a_later_step_takes_no_place(root, tmp_path):
    run_ranks(_stale, 1, tmp_path, root, tmp_path / "checkpoints")
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_0000002", "step_0000003"]


def _other_layout(rank: int, world: int, layout: str, root: Path, copies: Path) -> None:
    mesh = mesh_of(**LAYOUTS[layout][1])
    _, before = train(root, mesh, copies, rank, STOP + 1)
    _, after = train(root, mesh, copies, rank, None)
    after |= before
    want = torch.load(root / "fp32" / "metrics.pt")
    assert sorted(after) == list(range(STOP, CONFIG.steps))
    for step, values in after.items():
        assert values == pytest.approx(want[step], rel=1e-4), (step, values, want[step])


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "vpp2", "cp2"])
def test_checkpoint_continues_in_another_layout(layout, root, tmp_path):
    """And one that is written there is read there: stages of a tied embedding have several buckets."""
    copies = shutil.copytree(root / "fp32" / "at_stop", tmp_path / "checkpoints")
    run_ranks(_other_layout, 2, tmp_path, layout, root, Path(copies))


class _Late:
    """Weights that arrive when they are waited for, and not before."""

    def __init__(self, group: _ParamAndGradBucketGroup) -> None:
        self.group = group

    def wait(self) -> None:
        self.group.param_gather_handle = None
        _start(self.group, force_sync=True)


_start = _ParamAndGradBucketGroup.start_param_sync


def _start_late(group: _ParamAndGradBucketGroup, force_sync: bool = False) -> None:
    assert not force_sync
    group.param_gather_handle, group.param_gather_dispatched = _Late(group), True


def _overlapped(rank: int, world: int, root: Path, checkpoints: Path) -> None:
    mesh = mesh_of()
    # Buckets of a few parameters, and the slowest of networks.
    optimizer.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=1000)  # type: ignore[misc,assignment]
    found = []
    for overlap in (False, True):
        folder, cfg = checkpoints / str(overlap), replace(CONFIG, eval_every=2, overlap=overlap)
        _ParamAndGradBucketGroup.start_param_sync = _start_late if overlap else _start
        saved, before = train(root, mesh, folder, rank, STOP, cfg=cfg)
        weights, after = train(root, mesh, folder, rank, None, cfg=cfg)
        found.append((weights | {f"saved {name}": value for name, value in saved.items()}, before | after))
    (want, metrics), (got, seen) = found
    assert sorted(seen) == list(range(CONFIG.steps))
    for step, values in seen.items():
        assert values == pytest.approx(metrics[step], rel=1e-5), (step, values, metrics[step])
    # The norm by which gradients are clipped is summed in another order; a step moves a weight by about 1e-2.
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ["llama", CASE])
def test_overlap_changes_nothing(case, tmp_path):
    """In steps, held-out losses and checkpoints, with a head that is the embedding and one that is not."""
    for name, shape in (("teacher", {}), ("student", STUDENT)):
        save_tiny(case, tmp_path / name, **shape)
    run_ranks(_overlapped, 2, tmp_path, tmp_path, tmp_path / "checkpoints")


def _grows(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    _, student = filled(root / "student", mesh)
    dims, teacher = filled(root / "teacher", mesh)
    resident: dict[int, int] = {}

    def note(step: int, values: dict[str, float]) -> None:
        gc.collect()
        resident[step] = psutil.Process().memory_info().rss

    cfg = DistillConfig(steps=500, global_batch=2, checkpoint_every=1000, lr=1e-4)
    distill(
        student,
        LiveTeacher(teacher),
        sample,
        cfg,
        [MetricsLog(note, every=50)],
        checkpoints=Checkpoints(root / "long", keep=2, is_main=True),
    )
    early, late = resident[149], resident[499]
    # A step makes some 30 KiB of logits and hidden states; were those of each micro-batch kept, it would be 20 MiB.
    assert late - early < 8 * 2**20, resident


@pytest.mark.slow
def test_host_memory_does_not_grow(root, tmp_path):
    run_ranks(_grows, 1, tmp_path, root)
