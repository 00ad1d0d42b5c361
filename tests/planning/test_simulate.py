"""What stages need on fake tensors against what the same code needs on real ones, and against counts by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compactlm_nemo.config.load import compose
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.planning import passes, simulate, trainings
from compactlm_nemo.planning.estimate import without_host
from compactlm_nemo.planning.fake_world import FakeWorld, fake_world
from compactlm_nemo.planning.meter import Meter
from compactlm_nemo.planning.simulate import Cost, Place
from compactlm_nemo.planning.storage import heldout_state_bytes
from compactlm_nemo.search.cost import flops_per_token_forward
from tests.support.meshes import mesh_of
from tests.support.ranks import run_ranks
from tests.support.shapes import TINY

TEACHER = replace(
    TINY, num_layers=4, hidden_size=64, ffn_hidden_size=160, num_heads=8, num_query_groups=4, head_dim=8, vocab_size=517
)
STUDENT = replace(TEACHER, hidden_size=48, ffn_hidden_size=96)
EXPERTS: dict[str, Any] = {"family": "mixtral", "num_experts": 4, "experts_per_token": 2, "norm_topk": True}
LENGTH, COUNT = 32, 3

CASES: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "one": (1, {}, []),
    "bf16": (1, {}, ["model.precision=bf16"]),
    "recompute": (1, {}, ["distill.recompute=full"]),
    "selective": (1, {}, ["distill.recompute=selective"]),
    "dp2": (2, {}, []),
    "dp2_overlap": (2, {}, ["distill.overlap=true"]),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}, []),
    "pp2": (2, {"pp": 2}, []),
    "vpp2": (2, {"pp": 2, "virtual_stages": 2}, []),
    "cp2": (2, {"cp": 2}, []),
    "top_k": (1, {}, ["distill.teacher=stored", "cache.k=16"]),
    "stored_hidden": (1, {}, ["distill.teacher=stored", "cache.kind=hidden"]),
    "hidden": (1, {}, ["distill.hidden.layers=[[-2,-2],[1,1]]", "distill.hidden.embedding=true"]),
    "hidden_pp2": (2, {"pp": 2}, ["distill.hidden.mlp_input=[[0,0],[-1,-1]]", "distill.hidden.projection=per_pair"]),
    "correct": (2, {"tp": 2}, ["correct.while_distilling=true", "correct.steps=9", "distill.steps=9"]),
    "teacher_tp2": (2, {}, ["distill.teacher_tp=2"]),
    "teacher_pp2": (2, {"tp": 2, "sequence_parallel": True}, ["distill.teacher_tp=1", "distill.teacher_pp=2"]),
    "teacher_tp1": (2, {"tp": 2}, ["distill.teacher_tp=1"]),
}
"""Ranks, layout and settings."""
PASSES = {
    "score": passes.scoring,
    "taylor": passes.differentiating,
    "bi_blocks": passes.comparing_blocks,
    "left_out": passes.leaving_out(losses=True, logits=True),
    "blocks_left_out": passes.leaving_out(2, losses=True, logits=False),
    "cache": passes.caching,
    "evaluate": passes.evaluating,
}
STAGES = PASSES | {"distill": trainings.distilling}
WITH_EXPERTS = ["search.experts=[4]", "distill.recompute=selective"]
"""Settings of a run whose models have experts."""
EXPERT_CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, {"ep": 2}),
    "tp2_sp_ep2": (4, {"tp": 2, "sequence_parallel": True, "ep": 2}),
}


def config_of(layout: dict[str, Any], words: list[str]) -> Config:
    """Return the settings of a small run; the layout's names are those of `parallel`."""
    own = [f"parallel.{name}={value}" for name, value in layout.items()]
    sizes = [
        f"data.sequence_length={LENGTH}",
        "distill.micro_batch=2",
        "distill.loss_memory_mib=1",
        "score.micro_batch=2",
    ]
    return compose(["model.source=none", "run.dir=none", "score.second_moments=true", *sizes, *own, *words])


def as_numbers(cost: Cost) -> dict[str, Any]:
    return {
        "peaks": {phase: [peak.bytes, peak.by_kind] for phase, peak in cost.peaks.items()},
        "flops": cost.work.total_flops,
        "sent": sorted([*key, size] for key, size in cost.work.sent.items()),
    }


def real_rank(rank: int, world: int, stage: str, layout: dict[str, Any], words: list[str], out: Path) -> None:
    """Do on real tensors what is simulated, and write down what the meter saw."""
    there = FakeWorld(mesh_of(**layout), Meter())
    with there.meter:
        cost = STAGES[stage](there, config_of(layout, words), *models(words), count_of(layout))
    (out / f"{rank}.json").write_text(json.dumps(as_numbers(cost)))


def models(words: list[str]) -> tuple[Dims, Dims]:
    with_experts = EXPERTS if words == WITH_EXPERTS else {}
    return replace(TEACHER, **with_experts), replace(STUDENT, **with_experts)


def count_of(layout: dict[str, Any]) -> int:
    return 4 if layout.get("virtual_stages") else COUNT


EVERY = [("distill", case) for case in CASES]
EVERY += [(stage, case) for stage in PASSES for case in ("tp2_sp", "pp2")] + [
    ("cache", "top_k"),
    ("cache", "stored_hidden"),
]
QUICK = [("distill", case) for case in ("one", "tp2_sp", "pp2", "hidden", "correct", "teacher_tp2")]
QUICK += [("score", "tp2_sp"), ("left_out", "pp2"), ("cache", "top_k"), ("evaluate", "pp2"), ("evaluate", "tp2_sp")]


def slow(cases: list[Any]) -> list[Any]:
    """Return cases of which there are too many for every run of the tests."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    "stage, case",
    [*QUICK, *slow([each for each in EVERY if each not in QUICK])],
)
def test_memory_and_work_are_those_of_real_ranks(stage: str, case: str, tmp_path: Path) -> None:
    world, layout, words = CASES[case]
    run_ranks(real_rank, world, tmp_path, stage, layout, words, tmp_path)
    config = config_of(layout, words)
    for rank in range(world):
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        with fake_world(ParallelConfig(**layout), world=world, rank=rank, seed=1) as there:
            cost = STAGES[stage](there, config, *models(words), count_of(layout))
        planned = json.loads(json.dumps(as_numbers(cost)))
        assert planned["flops"] == real["flops"]
        for phase, (size, kinds) in real["peaks"].items():
            if phase == "gradients" and config.distill.overlap:
                continue  # copies that gloo sums beside backward are freed here, in the plan in the phase before
            # What ranks gather as objects is small, and here each has gathered its own alone.
            assert planned["peaks"][phase][0] == pytest.approx(size, rel=0.03), (phase, kinds, planned["peaks"][phase])


def test_states_that_wait_on_the_host_take_nothing_of_a_device() -> None:
    config, size = config_of({}, ["evaluate.micro_batch=2"]), 2 * COUNT * LENGTH * 4
    with fake_world(config.parallel, world=1, rank=0, seed=1) as there:
        cost = passes.evaluating(there, config, TEACHER, STUDENT, COUNT)
    assert cost.peaks["teacher"].by_kind["host"] == size * TEACHER.hidden_size
    assert cost.peaks["parameters"].by_kind["host"] == size * (TEACHER.hidden_size + STUDENT.hidden_size)
    # The teacher's output weights are there beside the student, and nothing else of it.
    assert cost.peaks["parameters"].by_kind["teacher"] == 4 * 64 * TEACHER.padded_vocab(1, config.model.vocab_multiple)
    before = cost.peaks["parameters"]
    after = without_host(cost).peaks["parameters"]
    assert after.bytes == before.bytes - before.by_kind["host"] and "host" not in after.by_kind


def test_the_hosts_memory_of_a_node_is_that_of_all_its_ranks_states() -> None:
    words = ["cluster=h100_sxm", "evaluate.tokens=1024", "data.heldout={a: a.jsonl, b: b.jsonl}", "parallel.tp=2"]
    config = config_of({}, words)
    world = 4 * config.cluster.devices_per_node
    got = heldout_state_bytes(config, TEACHER, STUDENT, world=world)
    windows = -(-(1024 // LENGTH) // (world // 2))  # of a data-parallel rank
    width = 2 * TEACHER.hidden_size + STUDENT.hidden_size
    itemsize = 2 if config.model.precision.name == "bf16" else 4
    assert got == config.cluster.devices_per_node * windows * LENGTH * width * itemsize


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_experts_get_as_many_tokens_as_on_real_ranks(case: str, tmp_path: Path) -> None:
    """Of all ranks together, as real tokens go to some experts more than to others."""
    world, layout = EXPERT_CASES[case]
    run_ranks(real_rank, world, tmp_path, "distill", layout, WITH_EXPERTS, tmp_path)
    flops, peaks, planned_flops, planned_peaks = 0, [], 0, []
    for rank in range(world):
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        with fake_world(ParallelConfig(**layout), world=world, rank=rank, seed=1) as there:
            cost = trainings.distilling(there, config_of(layout, WITH_EXPERTS), *models(WITH_EXPERTS), COUNT)
        flops, planned_flops = flops + real["flops"], planned_flops + cost.work.total_flops
        peaks.append(real["peaks"]["student"][0])
        planned_peaks.append(cost.peaks["student"].bytes)
    assert planned_flops == flops
    assert sum(planned_peaks) == pytest.approx(sum(peaks), rel=0.03), (planned_peaks, peaks)


@pytest.mark.parametrize("case", ["one", *slow(["recompute", "selective", "tp2_sp", "pp2", "vpp2"])])
def test_small_simulations_continue_to_large_ones(case: str) -> None:
    world, layout, words = CASES[case]
    config, layers, count = config_of(layout, words), 12, 8
    per_chunk = layers // config.parallel.num_chunks
    teacher, student = (dims.keep_layers(list(range(4)) * 3) for dims in (TEACHER, STUDENT))
    for rank in {0, world - 1}:
        place = Place(world=world, rank=rank, teacher_layers=per_chunk, student_layers=per_chunk, micro_batches=count)
        continued = simulate.simulate(trainings.distilling, config, teacher, student, place)
        with fake_world(config.parallel, world=world, rank=rank, seed=1) as there:
            whole = trainings.distilling(there, config, teacher, student, count)
        assert continued.work.total_flops == whole.work.total_flops
        assert continued.work.sent == whole.work.sent
        assert continued.kept_bytes == whole.kept_bytes
        for phase, peak in whole.peaks.items():
            assert continued.peaks[phase].bytes == pytest.approx(peak.bytes, rel=0.02), phase


def test_models_of_different_depth_are_continued_apart() -> None:
    config = config_of({}, [])
    teacher, student = TEACHER.keep_layers([0, 1, 2, 3] * 3), STUDENT.keep_layers([0, 1, 2, 3, 0])
    place = Place(world=1, rank=0, teacher_layers=12, student_layers=5, micro_batches=6)
    continued = simulate.simulate(trainings.distilling, config, teacher, student, place)
    with fake_world(config.parallel, world=1, rank=0, seed=1) as there:
        whole = trainings.distilling(there, config, teacher, student, 6)
    assert continued.work.total_flops == whole.work.total_flops
    assert continued.peak.bytes == pytest.approx(whole.peak.bytes, rel=0.02)


def test_a_step_has_the_flops_of_both_models() -> None:
    """Three forward passes of the student, one of the teacher, as counted from the architecture."""
    config = config_of({}, [])
    with fake_world(config.parallel, world=1, rank=0, seed=1) as there:
        cost = trainings.distilling(there, config, TEACHER, STUDENT, COUNT)
    tokens = COUNT * config.distill.micro_batch * LENGTH
    # Attention's backward pass is five products for two, the other layers' two for one.
    attention = 4 * STUDENT.num_layers * STUDENT.num_heads * STUDENT.head_dim * (LENGTH + 1) // 2
    expected = 3 * flops_per_token_forward(STUDENT, LENGTH) + attention // 2 + flops_per_token_forward(TEACHER, LENGTH)
    assert cost.work.total_flops == tokens * expected


@pytest.mark.parametrize(
    "stage, case", [(trainings.distilling, "tp2_sp"), (trainings.distilling, "pp2"), (trainings.correcting, "one")]
)
def test_less_is_kept_the_more_is_recomputed(stage: simulate.Simulation, case: str) -> None:
    world, layout, _ = CASES[case]
    kept: dict[str, int] = {}
    flops: dict[str, int] = {}
    for recompute in ("none", "selective", "full"):
        words = ["correct.steps=2", "correct.warmup_steps=0", f"distill.recompute={recompute}"]
        config = config_of(layout, words)
        with fake_world(config.parallel, world=world, rank=0, seed=1) as there:
            cost = stage(there, config, TEACHER, STUDENT, COUNT)
        kept[recompute], flops[recompute] = cost.peaks["student"].by_kind["activations"], cost.work.total_flops
    assert kept["full"] < 0.7 * kept["selective"] and kept["selective"] < 0.7 * kept["none"], kept
    assert flops["none"] < flops["selective"] < flops["full"], flops


@pytest.mark.parametrize("stage", [trainings.distilling, trainings.correcting])
def test_activations_are_those_of_a_micro_batch(stage: simulate.Simulation) -> None:
    kept = []
    for size in (1, 2):
        config = config_of({}, ["correct.steps=2", "correct.warmup_steps=0", f"distill.micro_batch={size}"])
        with fake_world(config.parallel, world=1, rank=0, seed=1) as there:
            kept.append(stage(there, config, TEACHER, STUDENT, COUNT).peaks["student"].by_kind["activations"])
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.02)


def test_optimizer_states_are_divided_by_the_data_parallel_ranks() -> None:
    config, held = config_of({}, []), {}
    for world in (1, 64):
        with fake_world(config.parallel, world=world, rank=0, seed=1) as there:
            held[world] = trainings.distilling(there, config, TEACHER, STUDENT, COUNT).peak.by_kind["optimizer"]
    assert held[64] < held[1] / 50
