"""A step of distillation at full width: no tensor on a wrong device, no wait that is not listed, no slow attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compactlm_nemo.config.distill import Recompute
from tests.fakecuda.cluster import cluster, skip_without_fake_cuda
from tests.fakecuda.experiment import distillation_step
from tests.fakecuda.listed import EXPERT_LAYER, STEP, unlisted

skip_without_fake_cuda()

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"world": 8},
    "tp8": {"world": 8, "tp": 8},
    "tp8_sp": {"world": 8, "tp": 8, "sequence_parallel": True},
    "pp2_first": {"world": 8, "pp": 2},
    "pp2_last": {"world": 8, "pp": 2, "rank": 7},
    "vpp2_first": {"world": 2, "pp": 2, "virtual_stages": 2},
    "vpp2_last": {"world": 2, "pp": 2, "virtual_stages": 2, "rank": 1},
    "cp2": {"world": 8, "cp": 2},
    "tp2_sp_cp2": {"world": 8, "tp": 2, "sequence_parallel": True, "cp": 2},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "tp8_sp": {"recompute": Recompute.full, "overlap": True}, "cp2": {"recompute": Recompute.selective},
}  # fmt: skip
DOCUMENT_END = 2
SHORT = 1024
"""Tokens of a sample where their number changes nothing that is measured."""
EXPERTS = {"family": "mixtral", "num_experts": 8, "experts_per_token": 2, "ffn_hidden_size": 1792}
GPT_OSS: dict[str, Any] = {
    **EXPERTS, "family": "gpt_oss", "attention_sinks": True, "router_bias": True, "mlp_bias": True, "qkv_bias": True,
    "proj_bias": True, "swiglu_limit": 7.0, "norm_topk": True, "window": 128, "local_layers": [True],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_waits_for_the_device_where_it_is_listed(layout: str) -> None:
    with cluster(**LAYOUTS[layout]) as there:
        distillation_step(there, dims={"layers": 1}, **SETTINGS.get(layout, {}))
    assert not unlisted(there.counts, STEP)
    assert there.counts.attention and "math" not in there.counts.attention


@pytest.mark.parametrize("layout", ["tp1", "pp2_last", "cp2", "tp2_sp_cp2"])
def test_more_micro_batches_are_no_more_waits(layout: str) -> None:
    waits = []
    for micro_batches in (2, 4):
        with cluster(**LAYOUTS[layout]) as there:
            distillation_step(there, dims={"layers": 1}, micro_batches=micro_batches, length=SHORT)
        waits.append(there.counts.waits)
    assert waits[0] == waits[1]


ATTENTION: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32_grouped": {"dtype": torch.float32},
    "window": {"dims": {"window": 300}},
    "documents": {"document_end": DOCUMENT_END},
    "documents_window_fp32": {"document_end": DOCUMENT_END, "dims": {"window": 300}, "dtype": torch.float32},
    "one_group": {"dims": {"num_query_groups": 1}},
}


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_never_writes_all_scores(case: str, context: int) -> None:
    settings = ATTENTION[case]
    dims = {"layers": 1, **settings.get("dims", {})}
    with cluster(world=2, cp=context) as there:
        distillation_step(there, **{**settings, "dims": dims}, length=SHORT, micro_batches=1)
    assert there.counts.attention and "math" not in there.counts.attention


@pytest.mark.parametrize("layout", [{"ep": 4}, {"ep": 2, "tp": 2, "sequence_parallel": True}, {"ep": 2, "pp": 2}])
def test_experts_wait_for_the_device_where_it_is_listed(layout: dict[str, Any]) -> None:
    with cluster(world=8, **layout) as there:
        distillation_step(there, dims={"layers": 1, **EXPERTS}, length=SHORT)
    assert not unlisted(there.counts, [*STEP, *EXPERT_LAYER])
    sent = {(key.kind, key.size) for key in there.counts.collectives if key.group == "expert_model_parallel"}
    assert sent == {("alltoall_base", layout["ep"])}
    assert "math" not in there.counts.attention


@pytest.mark.parametrize("layout", [{"ep": 4}, {"ep": 2, "tp": 2, "sequence_parallel": True}])
@pytest.mark.parametrize("document_end", [None, DOCUMENT_END])
def test_sinks_and_biased_experts_are_on_the_device(layout: dict[str, Any], document_end: int | None) -> None:
    with cluster(world=8, **layout) as there:
        distillation_step(there, dims={"layers": 1, **GPT_OSS}, length=SHORT, document_end=document_end)
    assert not unlisted(there.counts, [*STEP, *EXPERT_LAYER])
    assert there.counts.attention and "math" not in there.counts.attention


def test_documents_are_on_the_device_under_context_parallelism() -> None:
    with cluster(world=8, cp=2) as there:
        distillation_step(there, dims={"layers": 1}, document_end=DOCUMENT_END, length=SHORT)
    assert not unlisted(there.counts, STEP)


def test_batches_are_queued_to_the_device() -> None:
    with cluster() as there:
        distillation_step(there, dims={"layers": 1}, length=SHORT)
    files = {place.file for place in there.counts.waits}
    assert not files & {"training/batches.py", "parallel/background.py"}
