"""The table of axes against everything that has a field or an argument for each axis."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch

from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.build import tp_share
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.parameters import parameter_shapes
from compactlm_nemo.search.candidates import Candidate
from compactlm_nemo.search.latency import PARTS
from tests.support.shapes import NEMOTRON_15B

DIMS = Dims(**{**vars(NEMOTRON_15B), "num_experts": 4, "experts_per_token": 2, "shared_expert_ffn": 512})


def test_each_axis_is_one_size() -> None:
    assert DIMS.shape() == {
        "layers": 32, "hidden": 6144, "ffn": 24576, "heads": 48, "groups": 8, "experts": 4, "shared_expert_ffn": 512
    }  # fmt: skip
    sizes = {
        "num_layers": 9, "hidden_size": 10, "ffn_hidden_size": 11, "num_heads": 12, "num_query_groups": 3,
        "num_experts": 13, "shared_expert_ffn": 14,
    }  # fmt: skip
    cut = DIMS.with_shape(layers=9, hidden=10, ffn=11, heads=12, groups=3, experts=13, shared_expert_ffn=14)
    assert vars(cut) == vars(DIMS) | sizes
    assert DIMS.with_shape(**DIMS.shape()) == DIMS.with_shape() == DIMS


def test_a_search_has_a_setting_for_every_axis_and_no_other() -> None:
    assert {field.name for field in fields(SearchConfig) if field.type == "list[int]"} == set(AXES)
    with pytest.raises(ConfigError, match=re.escape(f"use one of {list(AXES)}")):
        SearchConfig(multiples={"vocab": 64})


def test_a_candidate_begins_with_the_axes() -> None:
    assert [field.name for field in fields(Candidate)][: len(AXES)] == list(AXES)


def test_times_of_layers_depend_on_every_axis_but_their_number() -> None:
    axes = {axis for part in PARTS.values() for axis in part}
    assert axes - {"heads_per_group"} | {"heads"} == set(AXES) - {"layers"}


def _split_dims(name: str, shape: tuple[int, ...]) -> set[int]:
    """Dimensions of a parameter of which each of two tensor-parallel ranks has a part."""
    full = torch.empty(shape, device="meta")
    share = tp_share(name, full, rank=0, size=2, gated=DIMS.gated_mlp, padded_vocab=DIMS.vocab_size)
    return {dim for dim, size in enumerate(shape) if share.shape[dim] != size}


@pytest.mark.parametrize("axis", AXES)
def test_tensor_parallelism_splits_what_the_table_says(axis: str) -> None:
    """An axis is split if a dimension that grows with its size is one in which ranks have parts of a parameter."""
    before, after = (parameter_shapes(dims) for dims in (DIMS, DIMS.with_shape(**{axis: 2 * DIMS.shape()[axis]})))
    grown = [
        (name, dim)
        for name in before.keys() & after.keys()
        for dim, sizes in enumerate(zip(before[name], after[name], strict=True))
        if sizes[0] != sizes[1]
    ]
    assert bool(grown) == (axis != "layers")  # another number of layers is another set of parameters
    assert any(dim in _split_dims(name, before[name]) for name, dim in grown) == AXES[axis].split_by_tp
