"""Measures held-out texts: the loss by document, and how far the models predict what the teacher predicts.

Shape suffixes: W windows, T tokens of a window, S places (T - 1), P predictions that count, U documents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactlm_nemo.data.marks import counts_of, ids_of
from compactlm_nemo.evaluation.flips import longest_flips
from compactlm_nemo.evaluation.lm_loss import LMLoss
from compactlm_nemo.evaluation.metric import TEACHER, Metric
from compactlm_nemo.evaluation.token_values import TeacherStates, TokenValues, host_states, measure_tokens
from compactlm_nemo.models.build import ModelChunks

Bar = Callable[[str, int, int], AbstractContextManager[Callable[[int], None]]]

LENGTHS = ("short", "medium", "long")
"""Slices by the length of documents, of equally many documents each."""
FREQUENCY_BINS = 5
"""Bins by how frequent a token is in the training text, of about equally many predictions each."""
MOST_RANGES = 8
"""Ranges of positions in a window."""
_BETTER = {"loss": "lower", "top1_agreement": "higher", "kl": "lower"}
"""Kind of metric -> what is better."""


class HeldoutText(NamedTuple):
    """A `HeldoutText` is the windows of a text and the documents in them."""

    windows_WT: Tensor
    """``[W, S + 1]``, with marks (`data.marks`), on the device of the models."""
    documents_WS: Tensor
    """``[W, S]``, number of the document of each target, on the CPU."""


class HeldoutQuality:
    """A `Measurement` of held-out texts; every model runs over each text once.

    Args:
        texts: By name.
        token_counts: Returns ``[V]``, how frequent each token is in the training text; called for the details.
        decode: Token ids -> text.
        micro_batch: Samples of a forward pass on one rank.
        bar: (label, samples, tokens of a sample) -> shows the progress.
    """

    def __init__(
        self,
        texts: Mapping[str, HeldoutText],
        *,
        token_counts: Callable[[], Tensor],
        decode: Callable[[list[int]], str],
        micro_batch: int,
        bar: Bar = lambda label, samples, tokens: nullcontext(lambda count: None),
    ) -> None:
        self.texts = {name: _Predictions(text) for name, text in texts.items()}
        self.token_counts, self.decode, self.micro_batch, self.bar = token_counts, decode, micro_batch, bar
        self.results: dict[str, dict[str, LMLoss]] = {}
        """Model -> text -> loss and forward speed."""
        self._teacher: dict[str, TeacherStates] = {}

    def measure(self, label: str, model: ModelChunks) -> None:
        """Run the model over each text, and compare it with the teacher, which must come first. Collective."""
        results = self.results[label] = {}
        weight_VG = model.head_weight.detach() if label == TEACHER and model.mesh.is_last_stage else None
        for name, text in self.texts.items():
            windows_WT = text.windows_WT
            states = host_states(model, windows_WT, micro_batch=self.micro_batch)
            teacher = None if label == TEACHER else self._teacher[name]
            with self.bar(f"evaluate {label} on {name}", len(windows_WT), windows_WT.shape[1] - 1) as advance:
                results[name], text.values[label] = measure_tokens(
                    model, windows_WT, states, micro_batch=self.micro_batch, progress=advance, teacher=teacher
                )
            if label == TEACHER:
                self._teacher[name] = TeacherStates(states, weight_VG)

    def metrics(self) -> list[Metric]:
        """Return loss, agreement with the teacher and KL from it, of each text and of its short to long documents."""
        found = []
        for name, text in self.texts.items():
            parts = {kind: text.by_document(kind) for kind in _BETTER}
            everything = {"": torch.arange(len(text.tokens_U))}
            for end, documents in (everything | {f"/{key}": rows for key, rows in text.lengths.items()}).items():
                found += [
                    Metric(
                        name=f"{kind}/{name}{end}",
                        parts={label: parts_UK[documents] for label, parts_UK in parts[kind].items()},
                        is_better=is_better,
                    )
                    for kind, is_better in _BETTER.items()
                ]
        return found

    def details(self) -> dict[str, Any]:
        """Return, by text: what the slices by length are; means by frequency and position; the longest flips."""
        counts_V = self.token_counts()
        return {name: self._details(text, counts_V) for name, text in self.texts.items()}

    def _details(self, text: _Predictions, counts_V: Tensor) -> dict[str, Any]:
        flips = {
            label: longest_flips(text.windows_WT.cpu(), text.values[TEACHER].top_WS, values.top_WS, decode=self.decode)
            for label, values in text.values.items()
            if label != TEACHER
        }
        return {
            "documents": len(text.tokens_U),
            "tokens": len(text.targets_P),
            "lengths": text.length_ranges(),
            "by_frequency": text.by_frequency(counts_V),
            "by_position": text.by_position(),
            "longest_flips": flips,
        }


class _Predictions:
    """`_Predictions` are the predictions of a text that count, and what the models made of them."""

    def __init__(self, text: HeldoutText) -> None:
        self.windows_WT, windows_WT = text.windows_WT, text.windows_WT.cpu()
        self.values: dict[str, TokenValues] = {}
        self.counts_WS = counts_of(windows_WT[:, :-1])
        self.targets_P = ids_of(windows_WT[:, 1:])[self.counts_WS]
        self.num_places = windows_WT.shape[1] - 1
        self.places_P = torch.arange(self.num_places).expand_as(self.counts_WS)[self.counts_WS]
        numbers_U, self.document_P = torch.unique(text.documents_WS[self.counts_WS], return_inverse=True)
        self.tokens_U = torch.bincount(self.document_P, minlength=len(numbers_U))

    def of(self, kind: str) -> dict[str, Tensor]:
        """Return model -> ``[P]`` float64: the loss, the KL, or whether the likeliest token is the teacher's."""
        if kind == "loss":
            return {label: values.loss_WS[self.counts_WS] for label, values in self.values.items()}
        found, teacher = {}, self.values[TEACHER]
        for label, values in self.values.items():
            if label != TEACHER:  # which is compared with itself in no metric
                assert values.kl_WS is not None
                agrees_WS = (values.top_WS == teacher.top_WS).double()
                found[label] = (values.kl_WS if kind == "kl" else agrees_WS)[self.counts_WS]
        return found

    def by_document(self, kind: str) -> dict[str, Tensor]:
        """Return model -> ``[U, 2]`` float64: sum over the predictions in each document, and their number."""
        return {
            label: self._sums(values_P, self.document_P, len(self.tokens_U))
            for label, values_P in self.of(kind).items()
        }

    @cached_property
    def lengths(self) -> dict[str, Tensor]:
        """Slice -> numbers of its documents; none where there are fewer documents than slices."""
        order_U = torch.argsort(self.tokens_U, stable=True)
        num = len(order_U)
        if num < len(LENGTHS):
            return {}
        ends = [num * (place + 1) // len(LENGTHS) for place in range(len(LENGTHS))]
        return {
            name: order_U[start:end].sort().values for name, start, end in zip(LENGTHS, [0, *ends], ends, strict=False)
        }

    def length_ranges(self) -> list[dict[str, Any]]:
        """Return what each slice by length holds."""
        return [
            {
                "slice": name,
                "from_tokens": int(self.tokens_U[documents].min()),
                "to_tokens": int(self.tokens_U[documents].max()),
                "documents": len(documents),
                "tokens": int(self.tokens_U[documents].sum()),
            }
            for name, documents in self.lengths.items()
        ]

    def by_frequency(self, counts_V: Tensor) -> list[dict[str, Any]]:
        """Return the means of bins of targets, by the rank of the target among the tokens of the training text."""
        rank_V = torch.empty_like(counts_V, dtype=torch.long)
        rank_V[torch.argsort(counts_V, descending=True, stable=True)] = torch.arange(1, len(counts_V) + 1)
        rank_P = rank_V[self.targets_P]
        sorted_P, num = rank_P.sort().values, len(rank_P)
        # One token is in one bin, whose last rank is that of the prediction at its quantile.
        lasts = sorted({int(sorted_P[max(0, num * (bin + 1) // FREQUENCY_BINS - 1)]) for bin in range(FREQUENCY_BINS)})
        bin_P = torch.bucketize(rank_P, torch.tensor(lasts))
        names = [{"from_rank": before + 1, "to_rank": last} for before, last in zip([0, *lasts], lasts, strict=False)]
        return self._means(names, bin_P)

    def by_position(self) -> list[dict[str, Any]]:
        """Return the means of ranges of places in the window."""
        num, length = min(MOST_RANGES, self.num_places), self.num_places
        firsts = [-(-number * length // num) for number in range(num)] + [length]
        names = [{"from": first, "to": after - 1} for first, after in zip(firsts, firsts[1:], strict=False)]
        return self._means(names, self.places_P * num // length)

    def _means(self, names: list[dict[str, Any]], bin_P: Tensor) -> list[dict[str, Any]]:
        """Return one entry a bin with a prediction that counts: its name, its tokens, each model's means."""
        sums = {
            kind: {label: self._sums(values_P, bin_P, len(names)) for label, values_P in self.of(kind).items()}
            for kind in _BETTER
        }
        tokens = torch.bincount(bin_P, minlength=len(names)).tolist()
        return [
            name
            | {"tokens": tokens[idx]}
            | {
                kind: {label: float(sums_UK[idx, 0] / sums_UK[idx, 1]) for label, sums_UK in of_model.items()}
                for kind, of_model in sums.items()
            }
            for idx, name in enumerate(names)
            if tokens[idx]
        ]

    @staticmethod
    def _sums(values_P: Tensor, group_P: Tensor, num: int) -> Tensor:
        """Return ``[num, 2]``: the sum of the values in each group, and their number."""
        both_P2 = torch.stack([values_P, torch.ones_like(values_P)], dim=1)
        return both_P2.new_zeros(num, 2).index_add(0, group_P, both_P2)
