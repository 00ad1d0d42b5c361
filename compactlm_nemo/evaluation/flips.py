"""Finds the longest runs of places at which a model would write another token than its teacher.

Shape suffixes: W windows, T tokens of a window, S places (T - 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from compactlm_nemo.data.marks import counts_of, ids_of

MOST_EXAMPLES = 5
CONTEXT_TOKENS = 32
"""Tokens in front of a run that an example shows."""


def longest_flips(
    windows_WT: Tensor, teacher_WS: Tensor, model_WS: Tensor, *, decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """Return the longest runs, longest first and the earlier of equals; a place that does not count ends a run.

    Every prediction is made with the true text before it, so a run is no continuation that a model wrote.

    Args:
        windows_WT: ``[W, S + 1]``, with marks, on the CPU.
        teacher_WS: The teacher's likeliest token at each place.
        model_WS: The model's.
    """
    ids, counts = ids_of(windows_WT), counts_of(windows_WT[:, :-1])
    runs = []
    for window, differs_S in enumerate(((teacher_WS != model_WS) & counts).tolist()):
        start = None
        for place, differs in enumerate([*differs_S, False]):
            if differs and start is None:
                start = place
            elif not differs and start is not None:
                runs.append((window, start, place))
                start = None
    runs.sort(key=lambda run: run[1] - run[2])
    return [
        {
            "window": window,
            "place": start,
            "length": end - start,
            # Place s predicts token s + 1.
            "context": decode(ids[window, max(0, start + 1 - CONTEXT_TOKENS) : start + 1].tolist()),
            "text": decode(ids[window, start + 1 : end + 1].tolist()),
            "teacher": decode(teacher_WS[window, start:end].tolist()),
            "model": decode(model_WS[window, start:end].tolist()),
        }
        for window, start, end in runs[:MOST_EXAMPLES]
    ]
