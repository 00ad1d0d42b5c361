"""Greedy continuations in every layout against transformers' generate, and how repetition is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from torch import Tensor

from compactlm_nemo.config.evaluate import ContinuationsConfig
from compactlm_nemo.data.prompts import document_beginnings
from compactlm_nemo.errors import ConfigError, DataError
from compactlm_nemo.evaluation import continuations as module
from compactlm_nemo.evaluation.continuations import Continuations, distinct_share, ends_in_loop, greedy_continuations
from tests.support.meshes import COMBINED, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

CASES = ("llama", "mistral_window")
NEW = 24
"""With 11 in front the texts grow beyond 32, to which they are filled up first."""


def prompts() -> Tensor:
    return torch.randint(3, VOCAB, (5, 11), generator=torch.Generator().manual_seed(3))


def ends_of(written: list[list[int]]) -> set[int]:
    """A token that some continuation has in its middle."""
    return {written[0][7]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("continuations")
    for case in CASES:
        model = save_tiny(case, root / case)
        model.generation_config.eos_token_id = None
        torch.save(_generated(model, None), root / case / "free.pt")
        torch.save(_generated(model, ends_of(_generated(model, None))), root / case / "ended.pt")
    return root


def _generated(model: Any, ends: set[int] | None) -> list[list[int]]:
    others: dict[str, Any] = {} if ends is None else {"eos_token_id": sorted(ends), "pad_token_id": 0}
    found = model.generate(
        prompts(), attention_mask=torch.ones_like(prompts()), do_sample=False, max_new_tokens=NEW, **others
    )
    rows = found[:, prompts().shape[1] :].tolist()
    if ends is None:
        return rows
    return [row[: min([i for i, t in enumerate(row) if t in ends], default=NEW - 1) + 1] for row in rows]


def _matches(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        _, model = filled(root / case, mesh)
        free, ended = (torch.load(root / case / f"{name}.pt") for name in ("free", "ended"))
        for ends, wanted in ((set(), free), (ends_of(free), ended)):
            steps: list[int] = []
            got = greedy_continuations(model, prompts(), NEW, ends, batch_tokens=70, progress=steps.append)
            assert got == wanted
            assert sum(steps) == max(map(len, wanted))
        assert min(map(len, ended)) < NEW


@pytest.mark.parametrize("layout", COMBINED)
def test_continuations_are_those_of_transformers_in_every_layout(layout, root, tmp_path):
    run_ranks(_matches, LAYOUTS[layout][0], tmp_path, LAYOUTS[layout][1], CASES if layout == "1" else CASES[:1], root)


def test_distinct_grams_are_counted_within_a_continuation() -> None:
    assert distinct_share([1, 2, 1, 2, 1], 2) == 2 / 4
    assert distinct_share([1, 2, 3, 4], 4) == 1
    assert distinct_share([1, 2, 3], 4) is None


@pytest.mark.parametrize(
    ("ids", "is_loop"),
    [
        ([9] * 16, True),
        ([9] * 15, False),  # too short to tell
        ([*range(40), *[7] * 15], False),
        ([*range(40), *[7] * 16], True),
        ([*range(40), *[1, 2, 3] * 6], True),
        ([*range(40), *[1, 2, 3] * 5, 1, 2], True),  # it need not end with a whole n-gram
        ([*range(40), *[1, 2, 3] * 6, 9], False),  # it has come out of it
        ([*range(100, 116)] * 3, True),
        ([*range(100, 116)] * 2 + [*range(100, 115)], False),
        ([*range(100, 117)] * 4, False),  # longer than 16
        ([*[1, 2, 3, 4, 5, 6, 7, 8] * 2], False),  # twice
        ([], False),
    ],
)
def test_a_loop_is_three_rounds_that_fill_sixteen_tokens(ids: list[int], is_loop: bool) -> None:
    assert ends_in_loop(ids) is is_loop


def test_metrics_are_means_over_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    written = [[5] * 48, [*range(48)], [1, 2]]
    monkeypatch.setattr(module, "greedy_continuations", lambda *_, **__: written)
    measurement = Continuations(
        torch.tensor([[1], [2], [3]]), 48, {0}, lambda ids: " ".join(map(str, ids)), batch_tokens=8
    )
    measurement.measure("teacher", None)  # type: ignore[arg-type]
    got = {m.name: float(m.statistic(m.parts["teacher"].sum(0))) for m in measurement.metrics()}
    assert got == {
        "distinct_2/continuations": pytest.approx((1 / 47 + 1 + 1) / 3),
        "distinct_4/continuations": pytest.approx((1 / 45 + 1) / 2),  # the third has no four tokens
        "loops/continuations": pytest.approx(1 / 3),
    }
    details = measurement.details()
    assert details["examples"][2] == {"prompt": "3", "teacher": "1 2"}
    assert details["mean_tokens"] == {"teacher": pytest.approx(98 / 3)}


def corpus(folder: Path, name: str, *documents: list[int]) -> Path:
    prefix = folder / name
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(1000))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_prompts_are_beginnings_of_long_documents_in_turn(tmp_path: Path) -> None:
    a = corpus(tmp_path, "a", [1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 0])
    b = corpus(tmp_path, "b", [11, 12, 13, 14, 0])
    assert document_beginnings([a, b], 9, 3).tolist() == [[1, 2, 3], [11, 12, 13], [6, 7, 8]]
    assert document_beginnings([a, b], 2, 3).tolist() == [[1, 2, 3], [11, 12, 13]]
    assert document_beginnings([a], 9, 3, bos=6).tolist() == [[6, 1, 2], [6, 7, 8]]
    with pytest.raises(DataError, match="evaluate.continuations.prompt_tokens=9: no held-out document has more tokens"):
        document_beginnings([a, b], 2, 9)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="evaluate.continuations.tokens=96 has no effect while prompts=0"):
        ContinuationsConfig(tokens=96)
    with pytest.raises(ConfigError, match="evaluate.continuations.tokens=47 must be >= 48"):
        ContinuationsConfig(prompts=1, tokens=47)
    assert ContinuationsConfig(prompts=1, tokens=96).tokens == 96
