"""Held-out quality in every layout against loops over documents, in floats, of transformers' logits in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.data.marks import mark
from compactlm_nemo.evaluation.flips import longest_flips
from compactlm_nemo.evaluation.heldout import HeldoutQuality, HeldoutText
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.evaluation.metric import summarise
from tests.support.meshes import LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

WINDOWS, PLACES = 5, 12
"""Neither two data-parallel ranks nor micro-batches of two come out even."""
DOCUMENTS = [
    [0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2],
    [2, 2, 2, 2, 3, 4, 4, 4, 4, 4, 4, 4],
    [5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6],
    [6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6],
    [8, 8, 8, 8, 8, 8, 8, 8, 8, 9, 9, 9],
]
"""Of each target; one spans windows, and one lies between windows, as where windows are passed over."""
Values = dict[str, list[list[float]]]


def windows() -> Tensor:
    return torch.randint(0, VOCAB, (WINDOWS, PLACES + 1), generator=torch.Generator().manual_seed(4))


def counts() -> Tensor:
    """Which places count: none of the third window, of the last all, and nowhere place 5 but there."""
    counts_WS = torch.rand(WINDOWS, PLACES, generator=torch.Generator().manual_seed(2)) < 0.6
    counts_WS[:, 5], counts_WS[2], counts_WS[4] = False, False, True
    return counts_WS


def frequencies() -> Tensor:
    """How frequent each token is in training; a third of them do not occur there."""
    return torch.randint(0, 9, (VOCAB,), generator=torch.Generator().manual_seed(7)).clamp(min=3).double() - 3


def text(is_marked: bool) -> HeldoutText:
    windows_WT = mark(windows(), F.pad(counts(), (0, 1), value=True)) if is_marked else windows()
    return HeldoutText(windows_WT, torch.tensor(DOCUMENTS))


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - log_sum for x in logits]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heldout")
    log_probs = {}
    for label, sizes in (("teacher", {}), ("pruned", {"hidden_size": 32, "intermediate_size": 48})):
        model = save_tiny("llama", root / label, **sizes)
        with torch.no_grad():
            # Both tend to repeat their input, so that they agree here and there.
            model.model.embed_tokens.weight *= 12
            model.lm_head.weight += model.model.embed_tokens.weight
            model.save_pretrained(root / label)
            logits = model.double()(windows()[:, :-1]).logits.tolist()
        log_probs[label] = [[log_softmax(place) for place in window] for window in logits]
    values: dict[str, Values] = {}
    for label, of_model in log_probs.items():
        values[label] = {"loss": [], "top": [], "kl": []}
        for window, tokens in enumerate(windows().tolist()):
            rows = list(zip(log_probs["teacher"][window], of_model[window], tokens[1:], strict=True))
            values[label]["loss"].append([-q[target] for _, q, target in rows])
            values[label]["top"].append([q.index(max(q)) for _, q, _ in rows])
            values[label]["kl"].append(
                [math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) for p, q, _ in rows]
            )
    torch.save(values, root / "values.pt")
    return root


class Reference:
    """The statistics, by loops."""

    def __init__(self, root: Path, is_marked: bool) -> None:
        self.values: dict[str, Values] = torch.load(root / "values.pt")
        self.values["distilled"] = self.values["teacher"]
        self.where = [
            (window, place)
            for window in range(WINDOWS)
            for place in range(PLACES)
            if not is_marked or counts()[window, place]
        ]

    def at(self, kind: str, label: str, window: int, place: int) -> float:
        if kind == "top1_agreement":
            return float(self.values[label]["top"][window][place] == self.values["teacher"]["top"][window][place])
        return self.values[label][kind][window][place]

    def by_document(self, kind: str, label: str) -> dict[int, tuple[float, int]]:
        found: dict[int, tuple[float, int]] = {}
        for window, place in self.where:
            total, num = found.get(DOCUMENTS[window][place], (0.0, 0))
            found[DOCUMENTS[window][place]] = total + self.at(kind, label, window, place), num + 1
        return found

    def mean(self, kind: str, label: str, where: list[tuple[int, int]]) -> float:
        return math.fsum(self.at(kind, label, *each) for each in where) / len(where)

    def check_bin(self, got: dict[str, Any], where: list[tuple[int, int]]) -> None:
        assert got["tokens"] == len(where)
        assert set(got["loss"]) == {"teacher", "pruned", "distilled"}
        assert set(got["kl"]) == set(got["top1_agreement"]) == {"pruned", "distilled"}
        for kind in ("loss", "kl", "top1_agreement"):
            for label, value in got[kind].items():
                assert value == pytest.approx(self.mean(kind, label, where), rel=1e-5, abs=1e-6), (kind, label)


def _matches(rank: int, world: int, layout: dict[str, Any], root: Path) -> None:
    mesh = mesh_of(**layout)
    quality = HeldoutQuality(
        {"all": text(False), "marked": text(True)}, token_counts=frequencies, decode=words, micro_batch=2
    )
    models = {name: filled(root / name, mesh)[1] for name in ("teacher", "pruned")}
    quality.measure("teacher", models["teacher"])
    quality.measure("pruned", models["pruned"])
    quality.measure("distilled", models["teacher"])
    metrics = {metric.name: metric for metric in quality.metrics()}
    details = quality.details()
    for name, is_marked in (("all", False), ("marked", True)):
        reference = Reference(root, is_marked)
        for kind, labels in (("loss", 3), ("kl", 2), ("top1_agreement", 2)):
            metric = metrics[f"{kind}/{name}"]
            assert len(metric.parts) == labels
            for label, parts_UK in metric.parts.items():
                want = [value for _, value in sorted(reference.by_document(kind, label).items())]
                torch.testing.assert_close(parts_UK, torch.tensor(want).double(), rtol=1e-5, atol=1e-5)
        # The teacher against itself.
        assert metrics[f"kl/{name}"].parts["distilled"][:, 0].abs().max() < 1e-5
        agreement_UK = metrics[f"top1_agreement/{name}"].parts["distilled"]
        assert torch.equal(agreement_UK[:, 0], agreement_UK[:, 1])
        assert 0 < metrics[f"top1_agreement/{name}"].parts["pruned"].sum(0)[0] < len(reference.where)
        _check_lengths(metrics, name, details[name], reference)
        _check_bins(details[name], reference)
        _check_flips(details[name]["longest_flips"], reference)
        for label, model in (("teacher", models["teacher"]), ("pruned", models["pruned"])):
            loss = evaluate_lm_loss(model, text(is_marked).windows_WT, micro_batch=2, progress=lambda samples: None)
            row, sums_K = quality.results[label][name], metrics[f"loss/{name}"].parts[label].sum(0)
            assert row.loss_nats == loss.loss_nats == pytest.approx(float(sums_K[0] / sums_K[1]), rel=1e-12)
            assert row.tokens == loss.tokens == sums_K[1] == len(reference.where)


def _check_lengths(metrics: dict[str, Any], name: str, details: dict[str, Any], reference: Reference) -> None:
    documents = sorted(reference.by_document("loss", "teacher").items())
    order = sorted(range(len(documents)), key=lambda i: (documents[i][1][1], i))
    num = len(order)
    cuts = [0, num // 3, num * 2 // 3, num]
    for place, part in enumerate(("short", "medium", "long")):
        chosen = sorted(order[cuts[place] : cuts[place + 1]])
        sizes = [documents[i][1][1] for i in chosen]
        assert details["lengths"][place] == {
            "slice": part, "from_tokens": min(sizes), "to_tokens": max(sizes), "documents": len(chosen),
            "tokens": sum(sizes),
        }  # fmt: skip
        parts_UK = metrics[f"loss/{name}/{part}"].parts["pruned"]
        of_model = [value for _, value in sorted(reference.by_document("loss", "pruned").items())]
        want = torch.tensor([of_model[i] for i in chosen]).double()
        torch.testing.assert_close(parts_UK, want, rtol=1e-5, atol=1e-5)


def _check_bins(details: dict[str, Any], reference: Reference) -> None:
    frequent = frequencies().tolist()
    order = sorted(range(VOCAB), key=lambda token: (-frequent[token], token))
    ranks = {token: place + 1 for place, token in enumerate(order)}
    targets = windows()[:, 1:].tolist()
    bins = details["by_frequency"]
    assert 3 < len(bins) <= 5 and bins[0]["from_rank"] == 1
    for before, after in zip(bins, bins[1:], strict=False):
        assert after["from_rank"] == before["to_rank"] + 1
    for got in bins:
        where = [at for at in reference.where if got["from_rank"] <= ranks[targets[at[0]][at[1]]] <= got["to_rank"]]
        reference.check_bin(got, where)
        assert abs(len(where) - len(reference.where) / 5) < 5
    assert sum(got["tokens"] for got in bins) == len(reference.where)
    spans = [(0, 1), (2, 2), (3, 4), (5, 5), (6, 7), (8, 8), (9, 10), (11, 11)]
    by_span = {span: [at for at in reference.where if span[0] <= at[1] <= span[1]] for span in spans}
    assert [(got["from"], got["to"]) for got in details["by_position"]] == [s for s in spans if by_span[s]]
    for got in details["by_position"]:
        reference.check_bin(got, by_span[got["from"], got["to"]])


def _check_flips(flips: dict[str, Any], reference: Reference) -> None:
    assert flips["distilled"] == []
    runs, where = [], set(reference.where)
    for window in range(WINDOWS):
        place = 0
        while place < PLACES:
            end = place
            while (window, end) in where and not reference.at("top1_agreement", "pruned", window, end):
                end += 1
            if end > place:
                runs.append((-(end - place), window, place))
            place = end + 1
    found = [(-each["length"], each["window"], each["place"]) for each in flips["pruned"]]
    assert found == sorted(runs)[:5] and found[0][0] < -1
    for each in flips["pruned"]:
        row, start, end = each["window"], each["place"], each["place"] + each["length"]
        tokens = windows()[row].tolist()
        assert each["context"] == words(tokens[: start + 1]) and each["text"] == words(tokens[start + 1 : end + 1])
        for key, label in (("teacher", "teacher"), ("model", "pruned")):
            assert each[key] == words(reference.values[label]["top"][row][start:end])  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["1", "dp2", "cp2", "tp2_pp2", "vpp2", "tp2_sp_cp2"])
def test_every_statistic_is_that_of_loops_in_every_layout(layout: str, root: Path, tmp_path: Path) -> None:
    run_ranks(_matches, LAYOUTS[layout][0], tmp_path, LAYOUTS[layout][1], root)


def _bf16(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    _, model = filled(root / "teacher", mesh, dtype=torch.bfloat16)
    quality = HeldoutQuality({"a": text(False)}, token_counts=frequencies, decode=words, micro_batch=2)
    quality.measure("teacher", model)
    quality.measure("pruned", model)
    summary = {each["metric"]: each for each in summarise(quality.metrics(), resamples=100, seed=1)}
    assert summary["kl/a"]["models"]["pruned"] == {"value": 0, "low": 0, "high": 0}
    assert summary["top1_agreement/a"]["models"]["pruned"] == {"value": 1, "low": 1, "high": 1}
    assert summary["loss/a"]["against_teacher"]["pruned"] == {"value": 0, "low": 0, "high": 0, "p": 1}


def test_a_teacher_in_bfloat16_agrees_with_itself_to_the_last_bit(root: Path, tmp_path: Path) -> None:
    run_ranks(_bf16, 1, tmp_path, root)


def test_a_run_of_flips_ends_with_the_window() -> None:
    windows_WT = torch.arange(8).view(2, 4)
    teacher_WS, model_WS = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 0, 1]])
    found = longest_flips(windows_WT, teacher_WS, model_WS, decode=words)
    assert [(each["window"], each["place"], each["length"]) for each in found] == [(0, 1, 2), (1, 0, 1), (1, 2, 1)]
    assert found[0] == {
        "window": 0, "place": 1, "length": 2, "context": "0 1", "text": "2 3", "teacher": "0 0", "model": "1 1",
    }  # fmt: skip


def test_too_few_documents_have_no_slices() -> None:
    documents = HeldoutText(windows(), (torch.tensor(DOCUMENTS) > 5).long())
    quality = HeldoutQuality({"a": documents}, token_counts=frequencies, decode=words, micro_batch=2)
    assert quality.texts["a"].lengths == {} and len(quality.texts["a"].tokens_U) == 2
