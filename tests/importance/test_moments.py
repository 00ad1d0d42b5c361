"""Second moments in every layout against transformers' models in float64; saved, read by rows, continued."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.importance.moments import MomentCollector, MomentSource, add_outer, save_moments
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import DataParallelSamples, forward_each
from compactlm_nemo.parallel.mesh import Mesh
from tests.importance.reference import experts_hook
from tests.support.meshes import COMBINED, EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

DENSE = ("llama", "nemotron")
EXPERTS = ("qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3")
SAMPLES, LENGTH = 5, 12


def windows() -> Tensor:
    """Five samples: neither two data-parallel ranks nor micro-batches of two come out even."""
    return torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(8))


def reference(model: Any) -> dict[str, Tensor]:
    """The definition: `[E, E]` float64 by name."""
    seen: dict[str, Tensor] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0]})

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.update({name: out})

    def routed(name: str, x: Tensor) -> None:
        if re.fullmatch(r"layers\.\d+\.experts\.\d+\.mlp", name):
            seen[name] = x  # 0 for a token that was sent elsewhere

    is_mixed = any(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.register_forward_pre_hook(experts_hook(layer.mlp, i, model.config, "after", routed))
        layer.self_attn.o_proj.register_forward_pre_hook(before(f"layers.{i}.heads"))
        layer.input_layernorm.register_forward_hook(after(f"layers.{i}.attention_norm"))
        layer.post_attention_layernorm.register_forward_hook(after(f"layers.{i}.mlp_norm"))
        if shared := getattr(layer.mlp, "shared_expert", None) or getattr(layer.mlp, "shared_experts", None):
            shared.down_proj.register_forward_pre_hook(before(f"layers.{i}.shared_expert.mlp"))
        elif hasattr(layer.mlp, "down_proj") and not is_mixed:  # a dense layer among others is not refitted
            layer.mlp.down_proj.register_forward_pre_hook(before(f"layers.{i}.mlp"))
    model.model.norm.register_forward_hook(after("final_norm"))
    with torch.no_grad():
        model(windows())
    return {name: torch.einsum("ni,nj->ij", x_NE, x_NE) for name, x in seen.items() for x_NE in [x.flatten(0, -2)]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("moments")
    for case in (*DENSE, *EXPERTS):
        torch.save(reference(save_tiny(case, root / case).double()), root / case / "moments.pt")
    return root


def _run(collector: MomentCollector, model: ModelChunks, mesh: Mesh, samples: Tensor) -> None:
    share = DataParallelSamples(samples, mesh, micro_batch=2)

    def start(idx: int | None) -> None:
        collector.on_batch(0 if idx is None else int(share.counted(idx, mesh.dp_rank).sum()))

    forward_each(model, share.batches, lambda idx, hidden: None, start)


def _collect_and_save(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path, out: Path):
    mesh = mesh_of(**layout)
    for case in cases:
        dims, model = filled(root / case, mesh)
        first, rest = windows().split([3, 2])
        collector = MomentCollector(model.eval(), experts=True)
        _run(collector, model, mesh, first)
        stored = out / f"{case}-{rank}.pt"
        torch.save(collector.state(), stored)
        _run(collector, model, mesh, rest)
        blocks = collector.reduce()
        for name, block in blocks.items():
            assert block.shape[0] * mesh.tp_size == block.shape[1], f"{name} is not sharded"

        continued = MomentCollector(model, experts=True)
        continued.load_state(torch.load(stored))
        _run(continued, model, mesh, rest)
        again = continued.reduce()
        assert again.keys() == blocks.keys() and all(torch.equal(again[name], blocks[name]) for name in blocks)
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for chunk in model for module in chunk.modules()
        )

        save_moments(out / case, blocks, mesh, tokens=SAMPLES * LENGTH)


def _check(case: str, root: Path, saved: Path) -> None:
    """In this process, which has no process group."""
    source = MomentSource(saved / case)
    assert source.tokens == SAMPLES * LENGTH
    want = torch.load(root / case / "moments.pt")
    assert source.sizes == {name: len(moment) for name, moment in want.items()}
    for name, expected in want.items():
        got = source.whole(name)
        assert got.dtype == torch.float32
        largest = float(expected.abs().max())
        torch.testing.assert_close(
            got.double(), expected, rtol=0, atol=1e-5 * largest, msg=lambda m, n=f"{case} {name}": f"{n}: {m}"
        )
        torch.testing.assert_close(got, got.T, rtol=0, atol=1e-6 * largest)
        assert torch.linalg.eigvalsh(got.double())[0] > -1e-6 * largest
        middle = len(expected) // 2
        for start, stop in ((0, 1), (middle - 5, middle + 5), (3, len(expected))):
            assert torch.equal(source.rows(name, start, stop), got[start:stop])


@pytest.mark.parametrize("layout", COMBINED)
def test_moments_are_the_definition_in_every_layout(layout: str, root: Path, tmp_path: Path) -> None:
    ranks, fields = LAYOUTS[layout]
    run_ranks(_collect_and_save, ranks, tmp_path, fields, DENSE, root, tmp_path)
    for case in DENSE:
        _check(case, root, tmp_path)


@pytest.mark.parametrize("layout", ["1", "cp2", *EXPERT_LAYOUTS])
def test_moments_of_a_model_with_experts(layout: str, root: Path, tmp_path: Path) -> None:
    ranks, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_collect_and_save, ranks, tmp_path, fields, EXPERTS, root, tmp_path)
    for case in EXPERTS:
        _check(case, root, tmp_path)


@pytest.mark.parametrize(("spread", "bound"), [(1.0, 1e-6), (0.0, 3e-8 * 500)])
def test_sums_of_massive_activations_are_accurate(spread: float, bound: float) -> None:
    """Channels 1e8 apart in 500 micro-batches; without spread some are constant and round in one direction."""
    rng = torch.Generator().manual_seed(2)
    scale_E = torch.logspace(-5, 3, 24)
    mean_E = torch.where(torch.arange(24) % 3 == 0, 1.0 + 0.1 * torch.rand(24, generator=rng), spread)
    total_EE = torch.zeros(24, 24)
    exact_EE = torch.zeros(24, 24, dtype=torch.float64)
    for _ in range(500):
        x_NE = (mean_E + spread * torch.randn(64, 24, generator=rng)) * scale_E
        add_outer(total_EE, x_NE, x_NE)
        exact_EE += x_NE.double().T @ x_NE.double()
    rms_E = exact_EE.diagonal().sqrt().clamp(min=1e-30)
    assert float(((total_EE - exact_EE).abs() / (rms_E[:, None] * rms_E)).max()) < bound


def _another_state(rank: int, world: int, root: Path, out: Path) -> None:
    mesh = mesh_of()
    dims, model = filled(root / "llama", mesh)
    collector = MomentCollector(model)
    state = collector.state()
    for other in (
        {name: block for name, block in state.items() if name != "final_norm"},
        {name: block[: len(block) // 2] for name, block in state.items()},
    ):
        with pytest.raises(CheckpointError, match="of another model or layout"):
            collector.load_state(other)
    save_moments(out / "llama", collector.reduce(), mesh, tokens=0)


def test_what_does_not_fit_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no second moments"):
        MomentSource(tmp_path)
    run_ranks(_another_state, 1, tmp_path, root, tmp_path)
    source = MomentSource(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="has no second moments layers.9.mlp"):
        source.whole("layers.9.mlp")
    with pytest.raises(ValueError, match="rows 40 to 50 of final_norm must be within its 48"):
        source.rows("final_norm", 40, 50)
