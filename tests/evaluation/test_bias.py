"""Bias scores of a set of questions that is worked out by hand with the paper's formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compactlm_nemo.data.questions import BiasQuestion, read_bias
from compactlm_nemo.evaluation import choices as module
from compactlm_nemo.evaluation.bias import Bias, bias_ambiguous, bias_disambiguated
from compactlm_nemo.evaluation.metric import summarise
from tests.data.test_questions import bbq, written
from tests.evaluation.test_likelihood import encoder

OLD, YOUNG, UNKNOWN = 0, 1, 2
GIVEN = [
    # condition, polarity, template, right answer, answer of the model; the stereotype is about the old
    ("ambig", "neg", "1", UNKNOWN, OLD),  # biased
    ("ambig", "neg", "1", UNKNOWN, OLD),  # biased
    ("ambig", "nonneg", "1", UNKNOWN, YOUNG),  # biased
    ("ambig", "nonneg", "2", UNKNOWN, OLD),  # against the bias
    ("ambig", "neg", "2", UNKNOWN, UNKNOWN),  # right
    ("disambig", "neg", "1", OLD, OLD),  # biased and right
    ("disambig", "neg", "2", YOUNG, YOUNG),  # against, right
    ("disambig", "nonneg", "2", OLD, OLD),  # against, right
    ("disambig", "nonneg", "2", OLD, UNKNOWN),  # wrong, names nobody
]


def questions(tmp_path: Path, *more: dict) -> list[BiasQuestion]:
    rows = [
        bbq(context_condition=condition, question_polarity=polarity, question_index=template, label=label)
        for condition, polarity, template, label, _ in GIVEN
    ]
    return read_bias(written(tmp_path / "a.jsonl", *rows, *more))


def measured(monkeypatch: pytest.MonkeyPatch, asked: list[BiasQuestion], **answers: list[int]) -> Bias:
    letters = [q._replace(question=q.question._replace(text="b", choices=("a", "b", "ab"))) for q in asked]
    bias = Bias("age", letters, encoder(), batch_tokens=8)
    for label, given in answers.items():
        values = torch.tensor([-1.0 if choice == answer else -2.0 for answer in given for choice in range(3)])
        monkeypatch.setattr(module, "log_likelihoods", lambda *_, values=values, **__: values)
        bias.measure(label, None)  # type: ignore[arg-type]
    return bias


def values_of(bias: Bias, label: str) -> dict[str, float]:
    return {m.name: float(m.statistic(m.parts[label].sum(0))) for m in bias.metrics()}


def test_scores_are_those_worked_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = [answer for *_, answer in GIVEN]
    bias = measured(monkeypatch, questions(tmp_path), teacher=answers)
    assert values_of(bias, "teacher") == {
        # 3 biased of 4 that name somebody: s = 0.5; 1 of 5 right: (1 - 0.2) * 0.5
        "bias_ambiguous/age": pytest.approx(0.4),
        "accuracy_ambiguous/age": pytest.approx(1 / 5),
        # 1 biased of 3 that name somebody
        "bias_disambiguated/age": pytest.approx(2 / 3 - 1),
        "accuracy_disambiguated/age": pytest.approx(3 / 4),
    }
    assert bias.details() == {
        "ambiguous": 5, "disambiguated": 4, "without_group": 0, "unknown_answers": {"teacher": 2},
    }  # fmt: skip
    assert [(m.units, m.is_better) for m in bias.metrics()] == [
        ("templates", None), ("templates", "higher"), ("templates", None), ("templates", "higher"),
    ]  # fmt: skip


def test_scores_are_those_of_lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lm_eval.tasks.bbq import utils

    generator = torch.Generator().manual_seed(4)
    answers = torch.randint(0, 3, (len(GIVEN),), generator=generator).tolist()
    asked = questions(tmp_path)
    got = values_of(measured(monkeypatch, asked, teacher=answers), "teacher")
    rows = [
        (float(a == q.question.answer), float(a == q.biased), float(a != q.unknown), not q.is_ambiguous)
        for a, q in zip(answers, asked, strict=True)
    ]
    assert got["bias_ambiguous/age"] == pytest.approx(utils.agg_amb_bias_scores(rows))
    assert got["bias_disambiguated/age"] == pytest.approx(utils.agg_disamb_bias_scores(rows))


def test_units_are_templates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = [answer for *_, answer in GIVEN]
    bias = measured(monkeypatch, questions(tmp_path), teacher=answers, pruned=answers)
    ambiguous, _, disambiguated, _ = bias.metrics()
    # biased, naming somebody, right, all
    assert ambiguous.parts["teacher"].tolist() == [[3, 3, 0, 3], [0, 1, 1, 2]]
    assert disambiguated.parts["teacher"].tolist() == [[1, 1, 1, 1], [0, 2, 2, 3]]
    summary = summarise(bias.metrics(), resamples=100, seed=1)[0]
    assert summary["num_units"] == 2 and summary["against_teacher"]["pruned"]["value"] == 0


def test_questions_without_a_group_count_in_accuracy_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = {"ans0": ["x", "old"], "ans1": ["y", "old"], "ans2": ["Not known", "unknown"]}
    asked = questions(tmp_path, bbq(answer_info=info))
    bias = measured(monkeypatch, asked, teacher=[answer for *_, answer in GIVEN] + [OLD])
    got = values_of(bias, "teacher")
    assert got["accuracy_ambiguous/age"] == pytest.approx(1 / 6)
    assert got["bias_ambiguous/age"] == pytest.approx((1 - 1 / 6) * 0.5)
    assert bias.details()["without_group"] == 1


def test_answers_that_name_nobody_have_no_bias() -> None:
    nobody = torch.tensor([0.0, 0.0, 5.0, 5.0], dtype=torch.float64)
    assert float(bias_ambiguous(nobody)) == 0
    assert bias_disambiguated(nobody).isnan()


def test_a_file_of_one_condition_has_its_metrics_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = read_bias(written(tmp_path / "a.jsonl", bbq()))
    assert set(values_of(measured(monkeypatch, asked, teacher=[2]), "teacher")) == {
        "bias_ambiguous/age", "accuracy_ambiguous/age",
    }  # fmt: skip
