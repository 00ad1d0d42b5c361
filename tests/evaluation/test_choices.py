"""Accuracy and calibration by hand, against scikit-learn, and against lm-eval on the real teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from compactlm_nemo.config.data import Bos
from compactlm_nemo.config.load import CONF
from compactlm_nemo.data.bundled import fetch_bundled
from compactlm_nemo.data.documents import DocumentEncoder
from compactlm_nemo.data.questions import Question, read_choices
from compactlm_nemo.data.tokenizer import end_of_text, load_tokenizer, window_start
from compactlm_nemo.errors import NumericsError
from compactlm_nemo.evaluation import choices as module
from compactlm_nemo.evaluation.choices import Choices, confidence_bin
from compactlm_nemo.evaluation.likelihood import PairEncoder
from compactlm_nemo.evaluation.metric import summarise
from compactlm_nemo.models import gguf
from tests.evaluation.test_likelihood import encoder
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_run import TASK


def measured(monkeypatch: pytest.MonkeyPatch, questions: list[Question], **values: list[list[float]]) -> Choices:
    """What is measured where models give these log-likelihoods."""
    choices = Choices("own", questions, encoder(), batch_tokens=8)
    for label, rows in values.items():
        flat = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
        monkeypatch.setattr(module, "log_likelihoods", lambda *_, flat=flat, **__: flat)
        choices.measure(label, None)  # type: ignore[arg-type]
    return choices


def value_of(choices: Choices, label: str) -> dict[str, float]:
    return {m.name: float(m.statistic(m.parts[label].sum(0))) for m in choices.metrics()}


def questions_of(answers: list[int], *choices: str) -> list[Question]:
    return [Question("b", choices or ("a", "bb", "abab"), answer, " ", f"f:{i}") for i, answer in enumerate(answers)]


def test_metrics_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    log = math.log
    rows = [
        [log(0.7), log(0.2), log(0.1)],  # right, at confidence 0.7
        [log(0.5), log(0.3), log(0.2)],  # wrong at 0.5; by length (1, 2, 4) -0.69, -0.60, -0.40: the last, right
        [log(0.1), log(0.1), log(0.8)],  # right at 0.8
        [log(0.08), log(0.06), log(0.06)],  # chances need not add up to 1: 0.4, 0.3, 0.3; right at 0.4
    ]
    got = measured(monkeypatch, questions_of([0, 2, 2, 0]), teacher=rows)
    # By length: -0.36, -0.80, -0.58 right; right; -2.3, -1.15, -0.06 right; -2.53, -1.41, -0.70 wrong.
    assert value_of(got, "teacher") == {
        "choices/own": 3 / 4,
        "choices_norm/own": 3 / 4,
        # Bins of 1/15: 0.7 in (10/15, 11/15], 0.5 in (7/15, 8/15], 0.8 in (11/15, 12/15], 0.4 in (5/15, 6/15].
        "ece/own": pytest.approx((0.3 + 0.5 + 0.2 + 0.6) / 4),
        "brier/own": pytest.approx(((0.09 + 0.04 + 0.01) + (0.25 + 0.09 + 0.64) + 0.06 + (0.36 + 0.09 + 0.09)) / 4),
    }
    assert got.details()["reliability"]["teacher"][0] == {
        "low": 5 / 15, "high": 6 / 15, "questions": 1, "confidence": pytest.approx(0.4), "accuracy": 1.0,
    }  # fmt: skip
    assert [(m.units, m.is_better) for m in got.metrics()] == [
        ("questions", better) for better in ("higher", "higher", "lower", "lower")
    ]


def test_answers_of_one_bin_are_averaged_before_they_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[math.log(0.61), math.log(0.39)], [math.log(0.65), math.log(0.35)]]
    got = measured(monkeypatch, questions_of([0, 1], "a", "b"), teacher=rows)
    assert value_of(got, "teacher")["ece/own"] == pytest.approx(abs(0.5 - 0.63))
    (only,) = got.details()["reliability"]["teacher"]
    assert only["accuracy"] == 0.5 and only["confidence"] == pytest.approx(0.63) and only["questions"] == 2


def test_calibration_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(200, 3, generator=generator, dtype=torch.float64) * 2
    answers = torch.multinomial(logits.softmax(-1) ** 0.5, 1, generator=generator)[:, 0].tolist()
    got = measured(monkeypatch, questions_of(answers), teacher=(logits - 30).tolist())
    chances = logits.softmax(-1).numpy()
    right, confidence = chances.argmax(1) == answers, chances.max(1)
    fraction, mean = calibration_curve(right, confidence, n_bins=15)
    bins = got.details()["reliability"]["teacher"]
    assert [each["accuracy"] for each in bins] == pytest.approx(fraction.tolist())
    assert [each["confidence"] for each in bins] == pytest.approx(mean.tolist())
    counts = numpy.array([each["questions"] for each in bins])
    values = value_of(got, "teacher")
    assert values["ece/own"] == pytest.approx(float((counts / 200 * abs(fraction - mean)).sum()))
    brier = brier_score_loss(answers, chances, labels=[0, 1, 2], scale_by_half=False)
    assert values["brier/own"] == pytest.approx(float(brier))
    assert values["choices/own"] == pytest.approx(right.mean())


def test_bins_are_closed_above() -> None:
    assert [confidence_bin(x) for x in (0.0, 0.01, 1 / 15, 1 / 15 + 1e-9, 0.5, 1.0)] == [0, 0, 0, 1, 7, 14]


def test_models_are_compared_question_by_question(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[-1.0, -2.0, -3.0]] * 6
    got = measured(monkeypatch, questions_of([0] * 6), teacher=rows, pruned=[row[::-1] for row in rows])
    summary = summarise(got.metrics(), resamples=50, seed=1)[0]
    assert summary["num_units"] == 6
    assert summary["against_teacher"]["pruned"]["value"] == -1.0


def test_a_likelihood_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NumericsError, match=r"f:0: the log-likelihoods of its choices are .* under the pruned"):
        measured(monkeypatch, questions_of([0]), pruned=[[-1.0, math.nan, -2.0]])


QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "Zürich"], "answer": 0},
    {
        "question": "Question: What is frozen water called?\nAnswer:",
        "choices": ["steam", "ice", "a cloud"],
        "answer": 1,
    },
    {"question": "The sky is ", "choices": ["blue.", "made of old cheese", "green"], "answer": 0},
    {"question": "Q: 2 + 2 = ?\nA:\n", "choices": ["22", "4", "5"], "answer": 1},
    {"question": "", "choices": ["The dog barks.", "The dogs barks.", "Dog the bark."], "answer": 0},
    {"question": "Café, naïve:", "choices": ["日本", "französisch", "ein langer Satz, der nicht passt"], "answer": 1},
    {"question": "one two " * 60 + "one", "choices": ["two", "three", "one"], "answer": 1},
    {"question": "The opposite of hot is", "choices": ["warm", "very very cold indeed", "cold"], "answer": 2},
]
"""Space and a line's end behind a question, none at all, letters outside of ASCII, a text that is cut on the left."""
POSITIONS = 100


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled teacher with fewer positions, and lm-eval's own results of it."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    assets, folder = CONF.parent / "runs" / "assets", tmp_path_factory.mktemp("teacher")
    fetch_bundled(assets)
    gguf.convert(assets / "teacher.gguf", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "tasks").mkdir()
    names = "".join(f"  - metric: {name}\n" for name in ("acc_norm", "brier_score"))
    (folder / "tasks" / "own.yaml").write_text(TASK.format(data=data) + names)
    lm: Any = HFLM(pretrained=str(folder), batch_size=2, device="cpu", dtype="float32")
    outcome: Any = lm_eval.simple_evaluate(
        model=lm, tasks=["own_choice"], task_manager=TaskManager(include_path=str(folder / "tasks")), bootstrap_iters=0
    )
    samples = sorted(outcome["samples"]["own_choice"], key=lambda sample: sample["doc_id"])
    likelihoods = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    values = {name: outcome["results"]["own_choice"][f"{name},none"] for name in ("acc", "acc_norm", "brier_score")}
    (folder / "wanted.json").write_text(json.dumps({"likelihoods": likelihoods, "values": values}))
    return folder


def _is_lm_evals(rank: int, world: int, layout: dict[str, Any], folder: Path) -> None:
    mesh = mesh_of(**layout)
    dims, model = filled(folder, mesh, vocab_multiple=128)
    documents = DocumentEncoder(tokenizer=load_tokenizer(folder), eod=end_of_text(folder), vocab_size=dims.vocab_size)
    pairs = PairEncoder(
        documents=documents, start=window_start(folder, Bos.tokenizer), max_positions=dims.max_position_embeddings
    )
    choices = Choices("own", read_choices(folder / "questions.jsonl"), pairs, batch_tokens=256)
    choices.measure("teacher", model)
    wanted = json.loads((folder / "wanted.json").read_text())
    got = choices._likelihoods.of["teacher"]
    assert [len(row) for row in got] == [3] * len(QUESTIONS)
    for row, other in zip(got, wanted["likelihoods"], strict=True):
        assert row == pytest.approx(other, abs=2e-3, rel=1e-4)
    values = value_of(choices, "teacher")
    assert values["choices/own"] == wanted["values"]["acc"]
    assert values["choices_norm/own"] == wanted["values"]["acc_norm"]
    assert values["brier/own"] == pytest.approx(wanted["values"]["brier_score"], abs=1e-3)
    assert 0 < values["choices/own"] < 1 and values["choices/own"] != values["choices_norm/own"]


@pytest.mark.parametrize("layout", [{}, pytest.param({"pp": 2}, marks=pytest.mark.slow)], ids=["1", "pp2"])
def test_answers_of_the_bundled_teacher_are_those_of_lm_eval(layout: dict[str, Any], teacher: Path, tmp_path: Path):
    run_ranks(_is_lm_evals, layout.get("pp", 1), tmp_path, layout, teacher)
