"""Every kind of rotary scaling: frequencies, factors and logits are those of transformers, and bad numbers one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.families import dims_of, resized
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.models.hf_config import quick_folder_dims
from compactlm_nemo.models.rope import attention_factor, inverse_frequencies
from tests.support.meshes import LAYOUTS, filled, mesh_of, whole_logits
from tests.support.ranks import run_ranks
from tests.support.tiny_models import EAGER, LENGTH, save_tiny, tiny_config, tokens

THETA = {"rope_theta": 10000.0}
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.5 + 0.7 * i for i in range(8)]
LONGROPE = THETA | {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
KINDS: dict[str, dict[str, Any]] = {
    "linear": THETA | {"rope_type": "linear", "factor": 4.0},
    "linear_by_1": THETA | {"rope_type": "linear", "factor": 1.0},
    "llama3": THETA
    | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": THETA | {"rope_type": "dynamic", "factor": 4.0},
    "yarn": THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn_of_its_own_numbers": THETA
    | {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0,
        "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False,
    },
    "yarn_with_a_factor": THETA
    | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    "longrope_short": LONGROPE | {"original_max_position_embeddings": LENGTH, "factor": 16.0},
    "longrope_long": LONGROPE | {"original_max_position_embeddings": LENGTH - 1, "factor": 16.0},
    "longrope_with_a_factor": LONGROPE | {"original_max_position_embeddings": LENGTH - 1, "attention_factor": 0.8},
}  # fmt: skip
PARTIAL = {"partial_rotary_factor": 0.5}
"""Of a Nemotron, of whose 16 channels a head 8 are rotated and multiplied."""


def _case(kind: str) -> tuple[str, dict[str, Any]]:
    return "llama", {"rope_parameters": dict(KINDS[kind]), "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rope")
    cases = {kind: _case(kind) for kind in KINDS}
    cases["partial"] = "nemotron", {"rope_parameters": KINDS["yarn_with_a_factor"] | PARTIAL}
    for name, (case, changes) in cases.items():
        model = save_tiny(case, folder / name, **changes)
        with torch.no_grad():
            torch.save(model(tokens()).logits, folder / name / "logits.pt")
    return folder


def _compare(rank: int, world: int, layout: str, root: Path) -> None:
    mesh = mesh_of(**LAYOUTS[layout][1])
    for folder in sorted(root.iterdir()):
        dims, model = filled(folder, mesh)
        got = whole_logits(model.eval(), dims, mesh, tokens())
        if got is not None:
            want = torch.load(folder / "logits.pt")
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4, msg=lambda m, name=folder.name: f"{name}: {m}")


@pytest.mark.parametrize("layout", ["1", "tp2_pp2", "cp2"])
def test_logits_are_those_of_transformers(layout: str, root: Path, tmp_path: Path) -> None:
    run_ranks(_compare, LAYOUTS[layout][0], tmp_path, layout, root)


def test_the_kinds_differ(root: Path) -> None:
    """Each would be seen if it were read as another one; `dynamic` within its length, and a factor of 1, are none."""
    plain = _logits(root / "dynamic")
    assert torch.equal(plain, _logits(root / "linear_by_1"))
    for kind in KINDS.keys() - {"dynamic", "linear_by_1"}:
        assert (_logits(root / kind) - plain).abs().max() > 1e-2, kind
    assert (_logits(root / "longrope_long") - _logits(root / "longrope_short")).abs().max() > 1e-2


def _logits(folder: Path) -> torch.Tensor:
    logits: torch.Tensor = torch.load(folder / "logits.pt")
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_factors_are_those_of_transformers(kind: str) -> None:
    case, changes = _case(kind)
    config = tiny_config(case, **changes)
    dims, rotary = dims_of(config), AutoModelForCausalLM.from_config(config, **EAGER).model.rotary_emb
    rotary(torch.zeros(1), torch.arange(LENGTH)[None])
    torch.testing.assert_close(inverse_frequencies(dims, LENGTH), rotary.inv_freq, rtol=1e-6, atol=0)
    assert math.isclose(attention_factor(dims), rotary.attention_scaling, rel_tol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_kept_by_quick_reading_and_by_a_cut(kind: str, root: Path, tmp_path: Path) -> None:
    dims, _ = open_hf(root / kind)
    assert quick_folder_dims(root / kind) in (dims, None)
    dims.save(tmp_path / "model.json")
    assert Dims.load(tmp_path / "model.json") == dims
    small = dims.with_shape(layers=2, ffn=40)
    assert dims_of(resized(tiny_config(*_case(kind)[:1], **_case(kind)[1]), small)) == small


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "spiral"}, "rope_type='spiral' is not supported; use one of default, linear"),
        ({"rope_type": "linear"}, "rope_type=linear lacks factor"),
        ({"rope_type": "linear", "factor": 0}, "factor=0 of its rotary embedding must be a number > 0"),
        ({"rope_type": "linear", "factor": math.inf}, "factor=inf"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": "fast"}, "beta_fast='fast'"),
        ({"rope_type": "longrope", "original_max_position_embeddings": 9, "short_factor": 1.0, "long_factor": LONG},
         "must be lists of one number"),
        ({"rope_type": "longrope", "original_max_position_embeddings": 9, "short_factor": [1.0], "long_factor": LONG},
         "must be lists of one number"),
    ],
)  # fmt: skip
def test_bad_numbers_are_named(rope: dict[str, Any], message: str) -> None:
    config = tiny_config("llama")
    config.rope_parameters = THETA | rope
    with pytest.raises(CheckpointError, match=message):
        dims_of(config)
