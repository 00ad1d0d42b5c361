"""Fused kernels of installed libraries are found, switched on for the trained model alone, and change no result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.compile import compile_layers
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training import optimizer as optimizer_module
from compactlm_nemo.training.fusions import available_fusions, fusions_text
from tests.distill import test_resume
from tests.distill.test_resume import CASE, CONFIG, STOP, STUDENT, train
from tests.support import fused_kernels
from tests.support.fused_kernels import write_stubs
from tests.support.meshes import LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

ROOT = Path(__file__).parents[2]
SPIKES = replace(CONFIG, spike_factor=1e9, keep_checkpoints=9)
"""Training that saves before its first step, and rewinds never."""


def _ranks_with(library: str, function: str, world: int, folder: Path, *args: str) -> None:
    """Run a function of this file on ranks that can import the library."""
    stubs = write_stubs(folder / f"stubs_{library}", library)
    code = (
        "import sys; from pathlib import Path; from tests.support.ranks import run_ranks\n"
        "from tests.training import test_fusions\n"
        "run_ranks(getattr(test_fusions, sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[3:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, function, str(world), str(folder), *args],
        env=os.environ | {"PYTHONPATH": f"{stubs}:{ROOT}"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def _equal(found: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


def _close(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Within the rounding of some hundred float32 operations; a forgotten weight decay alone would be 2e-3.

    By norms: where a gradient is rounding itself, Adam makes a whole step of it.
    """
    for name in want:
        assert (found[name] - want[name]).norm() < 1e-5 * want[name].norm(), name


def _plain(rank: int, world: int, folder: str) -> None:
    """Without any library, on a CPU."""
    assert fusions_text(available_fusions(is_cuda=False)) == "none"
    assert fusions_text(available_fusions(is_cuda=True)) == "torch fused AdamW"
    root = Path(folder)
    torch.save(train(root, mesh_of(), root / "plain", rank, None, cfg=SPIKES), root / "plain.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fusions")
    save_tiny(CASE, root / "teacher")
    save_tiny(CASE, root / "student", **STUDENT)
    run_ranks(_plain, 1, root, str(root))
    return root


def _fused_adam(rank: int, world: int, folder: str, library: str) -> None:
    root, mesh = Path(folder), mesh_of()
    names = {"apex": "apex FusedAdam", "transformer_engine": "Transformer Engine FusedAdam"}
    assert fusions_text(available_fusions(is_cuda=False)) == names[library]
    steps: list[Any] = []
    move = fused_kernels.FusedAdam.step
    fused_kernels.FusedAdam.step = lambda adam: (steps.append(adam), move(adam))[1]  # type: ignore[assignment,method-assign,misc,return-value]
    want, metrics = train(root, mesh, root / library / "whole", rank, None, cfg=SPIKES)
    modules = {type(adam).__module__ for adam in steps}
    assert len(steps) == CONFIG.steps and {name.partition(".")[0] for name in modules} == {library}
    _, before = train(root, mesh, root / library / "stopped", rank, STOP, cfg=SPIKES)
    at_start = shutil.copytree(root / library / "stopped", root / library / "at_start")
    shutil.copytree(root / library / "stopped", root / library / "at_stop")
    got, after = train(root, mesh, root / library / "stopped", rank, None, cfg=SPIKES)
    assert before | after == metrics and _equal(got, want)
    (at_start / "latest.json").write_text(json.dumps({"step": 0}))  # as a kill in the first step leaves it
    got, after = train(root, mesh, at_start, rank, None, cfg=SPIKES)
    assert after == metrics and _equal(got, want)
    _close(want, torch.load(root / "plain.pt")[0])


def _continued(rank: int, world: int, folder: str, library: str) -> None:
    root = Path(folder)
    got, after = train(root, mesh_of(**LAYOUTS["tp2"][1]), root / library / "at_stop", rank, None, cfg=SPIKES)
    for step, values in after.items():
        assert values == pytest.approx(torch.load(root / "plain.pt")[1][step], rel=1e-4), step
    assert sorted(after) == list(range(STOP, CONFIG.steps))


def _by_torch(rank: int, world: int, folder: str, library: str) -> None:
    root = Path(folder)
    got, _ = train(root, mesh_of(), root / library / "by_torch", rank, None, cfg=SPIKES)
    _close(got, torch.load(root / "plain.pt")[0])


@pytest.mark.parametrize("library", ["apex", pytest.param("transformer_engine", marks=pytest.mark.slow)])
def test_a_fused_adam_trains_and_resumes_as_torchs_does(library: str, root: Path) -> None:
    """From a checkpoint before the first step too, on two tensor-parallel ranks, and where the library is not."""
    _ranks_with(library, "_fused_adam", 1, root, library)
    shutil.copytree(root / library / "at_stop", root / library / "by_torch")
    run_ranks(_by_torch, 1, root, str(root), library)
    _ranks_with(library, "_continued", 2, root, library)


def _on_cuda() -> None:
    """Let training believe that its model is on a card."""
    optimizer_module.device = lambda: torch.device("cuda")


def _compiled(folder: Path, mesh: Mesh, **others: Any) -> tuple[Dims, ModelChunks]:
    dims, chunks = filled(folder, mesh, **others)
    compile_layers(chunks, backend="aot_eager")
    return dims, chunks


def _accumulates(rank: int, world: int, folder: str, is_compiled: str) -> None:
    root, mesh = Path(folder), mesh_of()
    _on_cuda()
    if is_compiled == "compiled":
        test_resume.filled = _compiled
    assert fusions_text(available_fusions(is_cuda=True)) == "apex FusedAdam, gradient accumulation"
    got, _ = train(root, mesh, root / is_compiled, rank, None, cfg=SPIKES)
    _close(got, torch.load(root / "plain.pt")[0])
    linears = [got[name] for name in got if "linear" in name]
    assert len(fused_kernels.calls) == len(linears) * CONFIG.global_batch * CONFIG.steps
    assert set(fused_kernels.calls) == {tuple(weight.shape) for weight in linears}
    _, other = filled(root / "teacher", mesh)  # no model but the trained one has the sum
    kinds = (ColumnParallelLinear, RowParallelLinear)
    modules = [module for chunk in other for module in chunk.modules() if isinstance(module, kinds)]
    assert modules and not any(module.gradient_accumulation_fusion for module in modules)


@pytest.mark.parametrize("layers", [pytest.param("plain_layers", marks=pytest.mark.slow), "compiled"])
def test_weight_gradients_are_added_by_the_product_that_makes_them(layers: str, root: Path) -> None:
    _ranks_with("apex", "_accumulates", 1, root, layers)


def _torch_fused(rank: int, world: int, folder: str) -> None:
    root, mesh = Path(folder), mesh_of()
    _on_cuda()
    want, metrics = train(root, mesh, root / "fused" / "whole", rank, None, cfg=SPIKES)
    _, before = train(root, mesh, root / "fused" / "stopped", rank, STOP, cfg=SPIKES)
    got, after = train(root, mesh, root / "fused" / "stopped", rank, None, cfg=SPIKES)
    assert before | after == metrics and _equal(got, want)
    plain = torch.load(root / "plain.pt")[0]
    _close(want, plain)
    assert not _equal(want, plain), "another kernel rounds elsewhere"


def test_torchs_own_fused_adam_is_taken_on_a_card(root: Path) -> None:
    run_ranks(_torch_fused, 1, root, str(root))
