"""Stopping and resuming changes nothing: on the same layout bit for bit, on another one up to rounding."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.distill.loop import Outside, distill
from compactlm_nemo.distill.teacher import LiveTeacher
from compactlm_nemo.models.build import global_names
from compactlm_nemo.parallel.groups import Mesh
from tests.megatron import LAYOUTS, filled, mesh_of
from tests.models.tiny import VOCAB, save_tiny
from tests.ranks import run_ranks

CASE = "llama_tied_llama3_rope"
CONFIG = DistillConfig(steps=5, global_batch=4, micro_batch=1, lr=1e-2, min_lr=1e-3, warmup_steps=2, checkpoint_every=2)
STOP = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Metrics = dict[int, dict[str, float]]


def sample(idx: int) -> Tensor:
    return torch.randint(0, VOCAB, (13,), generator=torch.Generator().manual_seed(idx))


def train(
    root: Path, mesh: Mesh, checkpoints: Path, rank: int, until: int | None, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Metrics]:
    """Weights after training a fresh model from the newest checkpoint, and the metrics of the steps done here."""
    _, student = filled(root / "student", mesh, dtype=dtype)
    dims, teacher = filled(root / "teacher", mesh, dtype=dtype)
    seen: Metrics = {}
    finished = distill(
        student, LiveTeacher(teacher, mesh), dims, mesh, sample, CONFIG,
        Outside(log=lambda step, values: seen.update({step: values})),
        chunk_tokens=7, checkpoints=checkpoints, is_main=rank == 0, device=torch.device("cpu"), until=until,
    )  # fmt: skip
    assert finished.step == (until or CONFIG.steps)
    weights = {name: value.detach().clone() for name, value in global_names(student)}
    return weights, {s: {k: v for k, v in m.items() if not k.startswith("perf/")} for s, m in seen.items()}


def _one_rank(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    for name, dtype in DTYPES.items():
        want, metrics = train(root, mesh, root / name / "whole", rank, None, dtype)
        _, before = train(root, mesh, root / name / "stopped", rank, STOP, dtype)
        assert sorted(before) == list(range(STOP))
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
    save_tiny(CASE, root / "student", num_hidden_layers=4, hidden_size=32, intermediate_size=48)
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
    _, after = train(root, mesh, copies, rank, None)
    want = torch.load(root / "fp32" / "metrics.pt")
    assert sorted(after) == list(range(STOP, CONFIG.steps))
    for step, values in after.items():
        assert values == pytest.approx(want[step], rel=1e-4), (step, values, want[step])


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "vpp2", "cp2"])
def test_checkpoint_continues_in_another_layout(layout, root, tmp_path):
    copies = shutil.copytree(root / "fp32" / "at_stop", tmp_path / "checkpoints")
    run_ranks(_other_layout, 2, tmp_path, layout, root, Path(copies))


def _grows(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    _, student = filled(root / "student", mesh)
    dims, teacher = filled(root / "teacher", mesh)
    resident: dict[int, int] = {}

    def note(step: int, values: dict[str, float]) -> None:
        gc.collect()
        resident[step] = psutil.Process().memory_info().rss

    cfg = DistillConfig(steps=500, global_batch=2, log_every=50, checkpoint_every=1000, lr=1e-4)
    distill(
        student, LiveTeacher(teacher, mesh), dims, mesh, sample, cfg, Outside(log=note),
        chunk_tokens=7, checkpoints=root / "long", is_main=True, device=torch.device("cpu"),
    )  # fmt: skip
    early, late = resident[149], resident[499]
    # A step makes some 30 KiB of logits and hidden states; were those of each micro-batch kept, it would be 20 MiB.
    assert late - early < 8 * 2**20, resident


def test_host_memory_does_not_grow(root, tmp_path):
    run_ranks(_grows, 1, tmp_path, root)
