"""Where the host may wait for the device, line by line; a wait that is not here fails a test.

A line is known by its file, its function and a part of its text. Add a line only with the reason why no way around it
is worth the trouble.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tests.fakecuda.counts import Counts, Place


class Listed(NamedTuple):
    """A line that may wait."""

    file: str
    function: str
    text: str
    most: int | None
    """Times in what is measured; None where Megatron-Core decides it by the number of parameters."""


HELD_OUT = [
    # Whether any token of the windows does not count decides whether masks are made, once for all batches.
    Listed("models/forward.py", "__init__", "self.is_marked", 1),
]
STEP = [
    # The loss terms of a step are logged, and a loss that is not finite or jumps decides what the step does.
    Listed("parallel/collectives.py", "last_stage_total", ".cpu()", 1),
    # Whether the norm is finite decides whether the step is taken.
    Listed("megatron/core/optimizer/clip_grads.py", "get_grad_norm_fp32", "total_norm.item()", 1),
    # Megatron-Core without apex and Transformer Engine: a norm a parameter, not one kernel for all.
    Listed("megatron/core/utils.py", "local_multi_tensor_l2_norm", "torch.tensor(", None),
    # Gradients of no token are left as they are.
    Listed("megatron/core/distributed/finalize_model_grads.py", "finalize_model_grads", "num_tokens > 0", 2),
]
"""In a step of distillation, under any layout."""
EXPERT_LAYER = [
    # Which rows the tokens become is looked up in the router's mask; Megatron-Core sorts instead from 0.18 on.
    Listed("megatron/core/transformer/moe/moe_utils.py", "permute", "masked_select(routing_map)", 8),
    # How many tokens each rank sends and gets is known before they go.
    Listed("megatron/core/transformer/moe/token_dispatcher.py", "_maybe_dtoh_and_synchronize", "synchronize()", 4),
]
"""In a layer with experts of a teacher and a student, two micro-batches."""
HIDDEN_LOSS = [
    # The ratio of the logit loss to the others is known before the next step.
    Listed("distill/hidden_states.py", "_finish", ".cpu()", 2),
    Listed("parallel/collectives.py", "last_stage_total", ".cpu()", 2),
]
"""In a step with losses between hidden states whose weight is balanced: the first step runs the student twice."""


def unlisted(counts: Counts, listed: list[Listed]) -> Counter[Place]:
    """Return the waits that are not listed, and those that are more often than listed."""
    remaining = Counter(counts.waits)
    for line in listed:
        places = [
            place
            for place in remaining
            if (place.file, place.function) == (line.file, line.function) and line.text in place.text
        ]
        if line.most is None or sum(remaining[place] for place in places) <= line.most:
            for place in places:
                del remaining[place]
    return remaining
