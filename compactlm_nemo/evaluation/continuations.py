"""Lets models continue texts, the likeliest token each time, and measures how much they repeat themselves.

Shape suffixes: P prompts, T tokens so far, B texts of a batch, S places of a text filled up, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.config.evaluate import LONGEST_LOOP, LOOP_ROUNDS
from compactlm_nemo.evaluation.heldout import Bar
from compactlm_nemo.evaluation.likelihood import no_bar, padded_length
from compactlm_nemo.evaluation.metric import Metric
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import DataParallelSamples, context_share, forward_each
from compactlm_nemo.parallel.collectives import last_stage_total
from compactlm_nemo.parallel.devices import device

NAME = "continuations"
_GRAMS = (2, 4)
_EXAMPLES = 4


@torch.no_grad()
def greedy_continuations(
    model: ModelChunks,
    prompts_PT: Tensor,
    num_tokens: int,
    ends: Collection[int],
    *,
    batch_tokens: int,
    progress: Callable[[int], None],
) -> list[list[int]]:
    """Return what a model writes behind each prompt, the token of largest logit each time. Collective.

    A continuation ends with a token of `ends`, which belongs to it, or with `num_tokens` tokens. Each token is a
    forward pass over all that stands before it: nothing is kept, and every layout that trains can do it.

    Args:
        prompts_PT: ``[P, T]`` int64 on the CPU, equal on every rank.
        batch_tokens: Most tokens of a batch on one rank.
        progress: Is told of each token that all continuations have got.
    """
    tokens_PT, num_prompt = prompts_PT, prompts_PT.shape[1]
    has_ended_P = torch.zeros(len(prompts_PT), dtype=torch.bool)
    ends_E = torch.tensor(sorted(ends))
    model.eval()
    while tokens_PT.shape[1] < num_prompt + num_tokens and not has_ended_P.all():
        next_P = next_tokens(model, tokens_PT, batch_tokens)
        tokens_PT = torch.cat([tokens_PT, next_P[:, None]], dim=1)
        has_ended_P |= torch.isin(next_P, ends_E)
        progress(1)
    return [_until_end(row, ends) for row in tokens_PT[:, num_prompt:].tolist()]


def next_tokens(model: ModelChunks, tokens_PT: Tensor, batch_tokens: int) -> Tensor:
    """Return ``[P]`` int64 on the CPU, the token with the largest logit behind each text; the lowest of equals."""
    mesh, num_tokens = model.mesh, tokens_PT.shape[1]
    length = padded_length(num_tokens, model.dims, mesh)
    share = DataParallelSamples(F.pad(tokens_PT, (0, length - num_tokens)), mesh, max(1, batch_tokens // length))
    own = torch.arange(len(tokens_PT))[share.rank :: share.dp_size].split(share.micro_batch)
    next_P = torch.zeros(len(tokens_PT), dtype=torch.long, device=device())
    # Under context parallelism one rank has the last token.
    last = (context_share(torch.arange(length)[None], mesh)[0] == num_tokens - 1).nonzero().flatten().tolist()

    def visit(idx: int, hidden_SBH: Tensor) -> None:
        num = share.num_local(idx)
        for place in last if num else ():
            next_P[own[idx].to(next_P.device)] = model.head().likeliest_ids(hidden_SBH[place, :num])

    forward_each(model, [batch.to(device()) for batch in share.batches], visit)
    return last_stage_total(next_P, mesh)


def _until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    end = next((place for place, number in enumerate(ids) if number in ends), len(ids) - 1)
    return ids[: end + 1]


def distinct_share(ids: list[int], n: int) -> float | None:
    """Return the different n-grams of a continuation over all of them; None where it has none.

    Source: Li et al. 2016, arXiv:1510.03055, section 5 (distinct-n), for one continuation instead of all together.
    """
    grams = [tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def ends_in_loop(ids: list[int]) -> bool:
    """Whether a continuation ends with an n-gram, n <= 16, that repeats to its end.

    It must stand there three times at least, and fill 16 tokens: a period of n over the last max(3 n, 16) tokens.
    Three equal tokens alone may be a number, or a rule across the page.
    """
    for n in range(1, LONGEST_LOOP + 1):
        tail = ids[-max(LOOP_ROUNDS * n, LONGEST_LOOP) :]
        if len(tail) >= max(LOOP_ROUNDS * n, LONGEST_LOOP) and tail[n:] == tail[:-n]:
            return True
    return False


class Continuations:
    """`Continuations` measures how much models repeat themselves behind the beginnings of held-out documents.

    Args:
        prompts_PT: ``[P, T]`` int64 on the CPU.
        num_tokens: Tokens of a continuation.
        ends: Tokens that end one.
        decode: Turns tokens into text, for the examples.
        batch_tokens: Most tokens of a forward pass on one rank.
        bar: (label, samples, tokens of a sample) -> shows the progress.
    """

    name = NAME

    def __init__(
        self,
        prompts_PT: Tensor,
        num_tokens: int,
        ends: Collection[int],
        decode: Callable[[list[int]], str],
        *,
        batch_tokens: int,
        bar: Bar = no_bar,
    ) -> None:
        self._prompts_PT, self._num_tokens, self._ends, self._decode = prompts_PT, num_tokens, ends, decode
        self._batch_tokens, self._bar = batch_tokens, bar
        self._of: dict[str, list[list[int]]] = {}
        """Model -> its continuations."""

    def measure(self, label: str, model: ModelChunks) -> None:
        """Let one model write, the teacher first. Collective."""
        with self._bar(f"continue texts by {label}", self._num_tokens, len(self._prompts_PT)) as advance:
            self._of[label] = greedy_continuations(
                model, self._prompts_PT, self._num_tokens, self._ends,
                batch_tokens=self._batch_tokens, progress=advance,
            )  # fmt: skip

    def metrics(self) -> list[Metric]:
        """Return the mean shares of distinct n-grams, and the share of continuations that end in a loop."""
        metrics = [self._metric(f"distinct_{n}", "higher", partial(_distinct_part, n=n)) for n in _GRAMS]
        return [*metrics, self._metric("loops", "lower", lambda ids: [float(ends_in_loop(ids)), 1.0])]

    def details(self) -> dict[str, Any]:
        """Return the first few prompts with what each model wrote, and the tokens that each wrote in the mean."""
        return {
            "mean_tokens": {label: sum(map(len, each)) / len(each) for label, each in self._of.items()},
            "examples": [
                {"prompt": self._decode(prompt)}
                | {label: self._decode(each[number]) for label, each in self._of.items()}
                for number, prompt in enumerate(self._prompts_PT[:_EXAMPLES].tolist())
            ],
        }

    def _metric(self, kind: str, is_better: str, part: Callable[[list[int]], list[float]]) -> Metric:
        parts = {
            label: torch.tensor([part(ids) for ids in each], dtype=torch.float64) for label, each in self._of.items()
        }
        return Metric(name=f"{kind}/{NAME}", parts=parts, units=NAME, is_better=is_better)


def _distinct_part(ids: list[int], *, n: int) -> list[float]:
    """Return what a continuation adds to the mean: nothing where it has no n-gram."""
    value = distinct_share(ids, n)
    return [0.0, 0.0] if value is None else [value, 1.0]
