"""Timing of layers: what is timed as what, by a clock that modules move; and that it runs in every kind of layout."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from compactlm_nemo.models.build import build_model
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.devices import peak_tflops
from compactlm_nemo.search import timing as speed
from compactlm_nemo.search.latency import FILE, PARTS, LatencyTable
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS, VOCAB_MULTIPLE, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import tiny_config, tokens

SECONDS = {
    "embedding": 2, "decoder.layers.0.input_layernorm": 3, "decoder.layers.0.self_attention": 5,
    "decoder.layers.0.pre_mlp_layernorm": 7, "decoder.layers.0.mlp": 11, "decoder.final_layernorm": 13,
}  # fmt: skip


def _attributes(rank, world):
    mesh, clock = mesh_of(), [0.0]
    dims = dims_of(tiny_config("llama")).with_shape(layers=1)
    chunks = build_model(dims, mesh, dtype=torch.float32, vocab_multiple=VOCAB_MULTIPLE)

    def move(seconds):
        clock[0] += seconds

    for name, seconds in SECONDS.items():
        chunks[0].get_submodule(name).register_forward_hook(lambda *_, by=seconds: move(by))
    with mock.patch.object(speed.time, "perf_counter", lambda: clock[0]):
        got = speed.time_parts(chunks, tokens(), with_output=True)
    assert got == {"attention": 8000, "mlp": 18000, "head": 15000}


def test_a_part_is_its_modules_and_the_norm_before_it(tmp_path):
    run_ranks(_attributes, 1, tmp_path)


def _measures(rank, world, layout, case, folder: Path):
    mesh, built = mesh_of(**layout), []
    teacher = dims_of(tiny_config(case))
    experts = [2, 4] if teacher.num_experts else [0]
    candidates = [
        teacher.with_shape(layers=n, hidden=h, ffn=f, experts=e) for n in (4, 2) for h in (48, 16) for f in (24, 8)
        for e in experts
    ]  # fmt: skip

    def build(dims):
        built.append(dims)
        return build_model(dims, mesh, dtype=torch.float32, vocab_multiple=VOCAB_MULTIPLE)

    def measured():
        known = broadcast_object(LatencyTable.load(folder / FILE, {"case": case}))
        return speed.time_layers(
            known, candidates, build=build, mesh=mesh, tokens_BS=tokens(),
            keep=lambda table: table.save(folder / FILE) if rank == 0 else None, progress=lambda count: None,
        )  # fmt: skip

    table = measured()
    assert {part: len(times) for part, times in table.times.items()} == {
        "attention": 2, "mlp": 4 * len(experts), "head": 2
    }  # fmt: skip
    assert all(ms > 0 for part in PARTS for ms in table.times[part].values())
    assert broadcast_object(table) == table
    assert all(table.milliseconds(dims) > 0 for dims in candidates)
    assert len(built) == 4 * len(experts) and {dims.num_layers for dims in built} == {mesh.layout.num_chunks}
    assert measured() == table and len(built) == 4 * len(experts)


@pytest.mark.parametrize(
    ("layout", "case"), [("1", "mistral_window"), ("vpp2", "qwen2_tied"), ("tp2_sp_ep2", "qwen2_moe")]
)
def test_layers_are_timed_once(layout, case, tmp_path):
    world, sizes = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_measures, world, tmp_path, sizes, case, tmp_path)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("CPU", None)]
)
def test_peaks_are_found_by_name(name, peak):
    assert peak_tflops(name) == peak
