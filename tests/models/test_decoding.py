"""Texts that grow token by token, against transformers' full pass in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compactlm_nemo.models.decoding import Decoding
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.models.limits import longest_text
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum
from compactlm_nemo.parallel.mesh import Mesh
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import CASES, EAGER, VOCAB, save_tiny

ROWS, LENGTH, LATE, SHRINK = 4, 20, 6, 14
"""Rows of a test, tokens of a row, and the steps at which row 1 begins a second text and at which rows are dropped."""
QUICK = ("tp2", "pp2", "tp2_sp_cp2", "ep2")


def _texts() -> list[Tensor]:
    """Texts of the rows, and one that begins late in row 1."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (LENGTH,), generator=generator) for _ in range(ROWS + 1)]


def _expected(folder: Path) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, **EAGER, dtype=torch.float64).eval()
    with torch.no_grad():
        return [model(text[None]).logits[0].log_softmax(-1) for text in _texts()]


def _check(mesh: Mesh, folder: Path, max_length: int) -> None:
    _, model = filled(folder, mesh, dtype=torch.float64)
    texts, expected = _texts(), torch.load(folder / "expected.pt")
    with Decoding(model.eval(), ROWS, max_length) as decoding:
        assert decoding.num_rows % ROWS == 0
        is_second = max_length == LENGTH  # row 1 begins its second text late
        rows, shrunk = list(range(decoding.num_rows)), False
        steps = [(0, 3), *((step, 1) for step in range(3, max_length))]  # the first three tokens at once
        for step, num in steps:
            if step == SHRINK:  # the last row of every four goes on, and row 1
                is_live_B = torch.tensor([row == 1 or row % ROWS == ROWS - 1 for row in rows])
                kept_PB = decoding.shrink(is_live_B.expand(mesh.dp_size, -1))
                shrunk = kept_PB is not None
                rows = rows if kept_PB is None else kept_PB[mesh.dp_rank].tolist()
                assert set(is_live_B.nonzero().flatten().tolist()) <= set(rows)
            late = [row == 1 and is_second and step >= LATE for row in rows]
            places = [
                (ROWS, step - LATE) if is_late else (row % ROWS, step) for row, is_late in zip(rows, late, strict=True)
            ]
            starts_B = torch.tensor([first for _, first in places])
            tokens_BC = torch.stack([texts[text][first : first + num] for text, first in places])
            found_BCV = torch.zeros(decoding.num_rows, num, VOCAB, dtype=torch.float64)

            def visit(rows_R: Tensor, hidden_RCH: Tensor, found_BCV: Tensor = found_BCV) -> None:
                logits = hidden_RCH @ model.head_weight.T
                found_BCV[rows_R] = all_gather(logits, mesh.tp_group, dim=-1)[..., :VOCAB].log_softmax(-1)

            decoding.extend(tokens_BC, starts_B, visit)
            found_BCV = all_reduce_sum(found_BCV, mesh.cp_group)
            for row, (text, first) in enumerate(places) if mesh.is_last_stage else ():
                wanted = expected[text][first : first + num]
                torch.testing.assert_close(
                    found_BCV[row], wanted, rtol=0, atol=1e-5, msg=lambda m: f"{folder.name}: {m}"
                )
        assert shrunk or mesh.layout.model_ranks > 1
    assert all(layer.self_attention.core_attention.kept_keys is None for layer in model.layers())


def _prepared(case: str, folder: Path) -> int:
    save_tiny(case, folder)
    torch.save(_expected(folder), folder / "expected.pt")
    return min(LENGTH, longest_text(open_hf(folder)[0]))


def _check_all(rank: int, world: int, folders: dict[Path, int], layout: dict[str, Any]) -> None:
    mesh = mesh_of(**layout)
    for folder, max_length in folders.items():
        _check(mesh, folder, max_length)


def test_each_token_sees_what_a_full_pass_shows_it(tmp_path: Path) -> None:
    """Of every family; a text of longrope that is longer than its limit would turn otherwise, and is not kept."""
    folders = {tmp_path / case: _prepared(case, tmp_path / case) for case in CASES}
    assert folders.pop(tmp_path / "phi3_tied_longrope") == 16 < LENGTH
    save_tiny("phi3_tied_longrope", tmp_path / "long", original_max_position_embeddings=LENGTH)
    torch.save(_expected(tmp_path / "long"), tmp_path / "long" / "expected.pt")
    run_ranks(_check_all, 1, tmp_path, folders | {tmp_path / "long": LENGTH}, {})


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS | EXPERT_LAYOUTS],
)
def test_layouts_show_the_same(layout: str, tmp_path: Path) -> None:
    world, settings = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    cases = ["gpt_oss", "deepseek_v2"] if layout in EXPERT_LAYOUTS else ["gemma3"]
    folders = {tmp_path / case: _prepared(case, tmp_path / case) for case in cases}
    run_ranks(_check_all, world, tmp_path, folders, settings)
