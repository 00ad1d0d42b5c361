"""Measures what a model knows by multiple-choice questions, and how well its confidence fits its accuracy.

Shape suffixes: U questions, K parts of a question, C choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.data.questions import Question
from compactlm_nemo.errors import NumericsError
from compactlm_nemo.evaluation.heldout import Bar
from compactlm_nemo.evaluation.likelihood import Pair, PairEncoder, log_likelihoods, no_bar
from compactlm_nemo.evaluation.metric import Metric
from compactlm_nemo.models.build import ModelChunks

NUM_BINS = 15
"""Bins of equal width that confidence is sorted into."""


class ChoiceLikelihoods:
    """`ChoiceLikelihoods` hold the log-likelihood of every choice of questions, of one model after the other.

    Args:
        name: What was measured, for messages.
        encoder: Turns texts into tokens.
        batch_tokens: Most tokens of a forward pass on one rank.
        bar: (label, samples, tokens of a sample) -> shows the progress.
    """

    def __init__(
        self, name: str, questions: Sequence[Question], encoder: PairEncoder, batch_tokens: int, bar: Bar
    ) -> None:
        self._name, self._questions, self._batch_tokens, self._bar = name, questions, batch_tokens, bar
        self._texts = encoder.encode(
            [Pair(q.text, q.delimiter + choice, q.where) for q in questions for choice in q.choices]
        )
        self.of: dict[str, list[list[float]]] = {}
        """Model -> the log-likelihoods in nats of each question's choices."""

    def measure(self, label: str, model: ModelChunks) -> None:
        """Measure one model. Collective."""
        tokens = sum(len(text.ids) for text in self._texts) // len(self._texts)
        with self._bar(f"evaluate {label} on {self._name}", len(self._texts), tokens) as advance:
            values = iter(
                log_likelihoods(model, self._texts, batch_tokens=self._batch_tokens, progress=advance).tolist()
            )
        self.of[label] = [[next(values) for _ in question.choices] for question in self._questions]
        for question, found in zip(self._questions, self.of[label], strict=True):
            if not all(map(math.isfinite, found)):
                raise NumericsError(
                    f"{question.where}: the log-likelihoods of its choices are {found} under the {label}; its weights "
                    "or model.precision do not hold."
                )


def likeliest(values: Sequence[float]) -> int:
    """Return the number of the largest value, the first of equals."""
    return max(range(len(values)), key=values.__getitem__)


def probabilities(log_likelihoods_C: Sequence[float]) -> list[float]:
    """Return the softmax over the choices of one question."""
    top = max(log_likelihoods_C)
    weights = [math.exp(value - top) for value in log_likelihoods_C]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def confidence_bin(confidence: float) -> int:
    """Return the bin m of `NUM_BINS`, from 0, with ``m / 15 < confidence <= (m + 1) / 15``."""
    return min(max(math.ceil(confidence * NUM_BINS) - 1, 0), NUM_BINS - 1)


def calibration_error(sums: Tensor) -> Tensor:
    """Return the expected calibration error of sums ``[..., 15 + 1]`` over questions.

    ``sum_m |B_m| / U * |accuracy(B_m) - confidence(B_m)| = sum_m |sum_(u in B_m) (right_u - confidence_u)| / U``; the
    parts of a question are what it adds to the inner sum of each bin, and 1.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    return sums[..., :-1].abs().sum(-1) / sums[..., -1]


class Choices:
    """`Choices` measures accuracy and calibration on a set of questions.

    The answer of a model is the choice of largest log-likelihood (lm-eval's `acc`); `choices_norm` divides that by the
    characters of the choice first (lm-eval's `acc_norm`). Its confidence is the softmax over the log-likelihoods.
    """

    def __init__(
        self, name: str, questions: Sequence[Question], encoder: PairEncoder, *, batch_tokens: int, bar: Bar = no_bar
    ) -> None:
        self.name = f"choices/{name}"
        self._of, self._questions = name, questions
        self._likelihoods = ChoiceLikelihoods(self.name, questions, encoder, batch_tokens, bar)

    def measure(self, label: str, model: ModelChunks) -> None:
        """Measure one model, the teacher first. Collective."""
        self._likelihoods.measure(label, model)

    def metrics(self) -> list[Metric]:
        """Return accuracy (plain and by length), calibration error and Brier score."""
        return [
            self._metric("choices", "higher", self._accuracy),
            self._metric("choices_norm", "higher", self._accuracy_by_length),
            self._metric("ece", "lower", self._calibration, statistic=calibration_error),
            self._metric("brier", "lower", self._brier),
        ]

    def details(self) -> dict[str, Any]:
        """Return the reliability diagram of each model: bins with a question, their mean confidence and accuracy."""
        return {"reliability": {label: self._bins(values) for label, values in self._likelihoods.of.items()}}

    def _metric(self, kind: str, is_better: str, parts: Any, **others: Any) -> Metric:
        return Metric(
            name=f"{kind}/{self._of}",
            parts={
                label: torch.tensor(
                    [parts(question, found) for question, found in zip(self._questions, values, strict=True)],
                    dtype=torch.float64,
                )
                for label, values in self._likelihoods.of.items()
            },
            units="questions",
            is_better=is_better,
            **others,
        )

    @staticmethod
    def _accuracy(question: Question, values: list[float]) -> list[float]:
        return [float(likeliest(values) == question.answer), 1.0]

    @staticmethod
    def _accuracy_by_length(question: Question, values: list[float]) -> list[float]:
        by_length = [value / len(choice) for value, choice in zip(values, question.choices, strict=True)]
        return [float(likeliest(by_length) == question.answer), 1.0]

    @staticmethod
    def _calibration(question: Question, values: list[float]) -> list[float]:
        confidence = max(probabilities(values))
        parts = [0.0] * NUM_BINS
        parts[confidence_bin(confidence)] = float(likeliest(values) == question.answer) - confidence
        return [*parts, 1.0]

    @staticmethod
    def _brier(question: Question, values: list[float]) -> list[float]:
        """Return ``sum_c (p_c - [c is right])^2``, and 1 (Brier 1950, with all choices)."""
        found = probabilities(values)
        return [sum((p - (number == question.answer)) ** 2 for number, p in enumerate(found)), 1.0]

    def _bins(self, values: list[list[float]]) -> list[dict[str, float]]:
        sorted_in: dict[int, list[tuple[float, bool]]] = {}
        for question, found in zip(self._questions, values, strict=True):
            confidence = max(probabilities(found))
            is_right = likeliest(found) == question.answer
            sorted_in.setdefault(confidence_bin(confidence), []).append((confidence, is_right))
        return [
            {
                "low": number / NUM_BINS,
                "high": (number + 1) / NUM_BINS,
                "questions": len(answers),
                "confidence": math.fsum(confidence for confidence, _ in answers) / len(answers),
                "accuracy": sum(is_right for _, is_right in answers) / len(answers),
            }
            for number, answers in sorted(sorted_in.items())
        ]
