"""The walk against one over transformers' models in float64, and the same student in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compactlm_nemo.models.build import build_model, fill
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf import export_hf, open_hf
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.pruning.cut import CutSource, NarrowedSource
from compactlm_nemo.pruning.reconstruct_sequential import SequentialReconstruction
from compactlm_nemo.pruning.residual_stream import RotatedStream, Selection
from compactlm_nemo.pruning.rotation import Rotation
from tests.pruning.test_cut import EVERY, HEAD_DIM, HEADS, HIDDEN, LAYERS, MLP, plan_of, student_of
from tests.pruning.test_reconstruct import calibration
from tests.support.meshes import COMBINED, LAYOUTS, filled, mesh_of, whole_logits
from tests.support.ranks import run_ranks
from tests.support.tiny_models import EAGER, save_tiny, tokens

RIDGE = 1e-3


CASES = {"llama": HIDDEN, "nemotron_tied_biases": HIDDEN, "qwen3": EVERY, "granite_tied_biases": HIDDEN}
"""Model and kept channels: with EVERY the readers stay as they are."""


def seen_in(model: Any, wanted: dict[str, tuple[Any, bool]]) -> dict[str, numpy.ndarray]:
    """`[tokens, E]` inputs (or outputs: True) of modules."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, (module, is_output) in wanted.items():
        hook = lambda _, args, out, n=name, o=is_output: seen.__setitem__(n, out if o else args[0])  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(calibration(), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: x.flatten(0, 1).numpy() for name, x in seen.items()}


def solved(linear: Any, x: numpy.ndarray, target: numpy.ndarray, weight: numpy.ndarray) -> None:
    """argmin sum weight |x W'^T - target|^2 + d |W' - W|^2, written into the module."""
    old = linear.weight.detach().numpy()
    root = numpy.sqrt(weight)
    damping = numpy.sqrt(RIDGE * ((root * x) ** 2).sum(axis=0).mean())
    rows = numpy.vstack([root * x, damping * numpy.eye(x.shape[1])])
    new = numpy.linalg.lstsq(rows, numpy.vstack([root * target, damping * old.T]), rcond=None)[0].T
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(new))


def walked(teacher: Any, student: Any, hidden: list[int]) -> Any:
    """The student after the walk, by transformers' modules alone."""
    ends = [LAYERS[1], len(teacher.model.layers)]
    for j, (i, end) in enumerate(zip(LAYERS, ends, strict=True)):
        own, big = student.model.layers[j], teacher.model.layers[i]
        after = teacher.model.layers[end].input_layernorm if end < 4 else teacher.model.norm
        aim = seen_in(
            teacher,
            {
                "y": (big.input_layernorm, True), "r": (big.post_attention_layernorm, False),
                "y2": (big.post_attention_layernorm, True), "h": (after, False),
            },
        )  # fmt: skip
        is_narrowed = len(hidden) < 48
        channels = [head * HEAD_DIM + c for head in HEADS[i] for c in range(HEAD_DIM)]
        ones = numpy.ones((len(aim["y"]), 1))
        readers = {"q_proj": channels, "k_proj": slice(None), "v_proj": slice(None)}
        if is_narrowed:
            z = seen_in(student, {"z": (own.input_layernorm, True)})["z"]
            for name, rows in readers.items():
                full = getattr(big.self_attn, name).weight.detach().numpy()[rows]
                solved(getattr(own.self_attn, name), z, aim["y"] @ full.T, ones)
        _solve_writer(student, own.self_attn.o_proj, own.input_layernorm, aim["r"][:, hidden])
        if is_narrowed:
            z = seen_in(student, {"z": (own.post_attention_layernorm, True)})["z"]
            for name in ("gate_proj", "up_proj"):
                if hasattr(own.mlp, name):
                    full = getattr(big.mlp, name).weight.detach().numpy()[MLP[i]]
                    solved(getattr(own.mlp, name), z, aim["y2"] @ full.T, ones)
        _solve_writer(student, own.mlp.down_proj, own.post_attention_layernorm, aim["h"][:, hidden])
    return student


def _solve_writer(student: Any, linear: Any, norm: Any, target: numpy.ndarray) -> None:
    seen = seen_in(student, {"x": (linear, False), "stream": (norm, False)})
    bias = 0 if linear.bias is None else linear.bias.detach().numpy()
    factor = getattr(student.config, "residual_multiplier", 1)
    solved(linear, seen["x"], (target - seen["stream"]) / factor - bias, 1 / (target**2).mean(axis=1, keepdims=True))


def plain_source(dims: Dims, source: Any, hidden: list[int]) -> tuple[Any, Any]:
    """(the cut before its stream is narrowed, the plain cut)."""
    wide = CutSource(dims, plan_of(hidden), source)
    return wide, NarrowedSource(wide, dims, LAYERS, Selection(torch.tensor(hidden)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("walk")
    for case, hidden in CASES.items():
        save_tiny(case, root / case)
        dims, source = open_hf(root / case)
        cut = plain_source(dims, source, hidden)[1]
        export_hf(root / case, root / f"{case}_cut", student_of(dims, hidden), cut, torch.float32)
        big, small = (
            AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float64, **EAGER).eval()
            for name in (case, f"{case}_cut")
        )
        walked(big, small, hidden)
        with torch.no_grad():
            torch.save(small(tokens(), use_cache=False).logits, root / f"{case}.pt")
    return root


def reconstruction(
    kind: type[SequentialReconstruction],
    folder: Path,
    mesh: Mesh,
    hidden: list[int],
    dtype: torch.dtype = torch.float32,
) -> SequentialReconstruction:
    """Return the reconstruction of a plainly cut student of the teacher in `folder`, ready to run."""
    dims, teacher = filled(folder, mesh, dtype=dtype)
    wide, narrow = plain_source(dims, open_hf(folder)[1], hidden)
    model = build_model(student_of(dims, hidden), mesh, dtype=dtype, vocab_multiple=8)
    fill(model, narrow, 8)
    return kind(
        student=model,
        teacher=teacher.eval(),
        plan=plan_of(hidden),
        hidden=Selection(torch.tensor(hidden)),
        wide_source=wide,
        windows_NS=calibration(),
        micro_batch=2,
        ridge=RIDGE,
    )


def _walk(rank: int, world: int, layout: str, root: Path) -> None:
    mesh = mesh_of(**LAYOUTS[layout][1])
    for case, hidden in CASES.items():
        walk, done = reconstruction(SequentialReconstruction, root / case, mesh, hidden), list[int]()
        walk.run(done.append)
        assert sum(done) == 2
        logits = whole_logits(walk.student, walk.dims, mesh, tokens())
        if logits is not None:
            want = torch.load(root / f"{case}.pt")
            torch.testing.assert_close(logits.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("layout", ["1", *(name for name in COMBINED if name not in ("1", "vpp2"))])
def test_the_walk_is_that_over_transformers_models(layout, root, tmp_path):
    run_ranks(_walk, LAYOUTS[layout][0], tmp_path, layout, root)


class _Watched(SequentialReconstruction):
    """A reconstruction that notes what it keeps on the host."""

    def _fit(self, part: str, layer: int, student: Any, targets: Any, to_student: Any) -> None:
        held = sum(target.nbytes for target in targets.values())
        vars(self).setdefault("held", []).append((layer, held, {target.dtype for target in targets.values()}))
        super()._fit(part, layer, student, targets, to_student)


def _keeps_one_layer(rank: int, world: int, root: Path) -> None:
    walk = reconstruction(_Watched, root / "llama", mesh_of(), HIDDEN, dtype=torch.bfloat16)
    walk.run(lambda done: None)
    stream_bytes = calibration().numel() * walk.teacher_dims.hidden_size * 2
    # Each of two layers is fitted in four parts, of which every part has its own target.
    assert vars(walk)["held"] == [(layer, 4 * stream_bytes, {torch.bfloat16}) for layer in (0, 1) for _ in range(4)]


def test_the_targets_of_one_layer_alone_are_kept_in_the_models_dtype(root, tmp_path):
    run_ranks(_keeps_one_layer, 1, tmp_path, root)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_streams_map_is_on_its_device_and_does_what_writers_get(device):
    rng = torch.Generator().manual_seed(5)
    stream_NH, basis_HK = torch.randn(7, 6, generator=rng), torch.randn(6, 3, generator=rng, dtype=torch.float64)
    scale_H = torch.rand(6, generator=rng, dtype=torch.float64) + 0.5
    rotation = Rotation(basis_HK, scale_H, torch.ones(3), is_tied=True, energy_H=torch.ones(6))
    cuts = {
        "selected": (Selection(torch.tensor([4, 0, 5])), stream_NH.numpy()[:, [4, 0, 5]]),
        "turned": (
            RotatedStream(rotation, None, RIDGE),  # type: ignore[arg-type]  # the map reads no moments
            (stream_NH.double().numpy() * scale_H.numpy()) @ basis_HK.numpy(),
        ),
    }
    for name, (cut, want) in cuts.items():
        got = cut.stream_map(torch.device(device))(stream_NH.to(device))
        assert got.device.type == device and got.shape == want.shape and got.dtype == torch.float32, name
        if device == "cpu":
            numpy.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)


def test_with_nothing_removed_it_stands_still(root, tmp_path):
    run_ranks(_stands_still, 1, tmp_path, root)


def _stands_still(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    dims, teacher = filled(root / "qwen3", mesh)
    model = filled(root / "qwen3", mesh)[1]
    before = [p.clone() for p in model.parameters()]
    plan = replace(plan_of(EVERY), layers=[0, 1, 2, 3])
    source = open_hf(root / "qwen3")[1]
    SequentialReconstruction(
        student=model,
        teacher=teacher.eval(),
        plan=plan,
        hidden=Selection(torch.tensor(EVERY)),
        wide_source=source,
        windows_NS=calibration(),
        micro_batch=2,
        ridge=RIDGE,
    ).run(lambda done: None)
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
