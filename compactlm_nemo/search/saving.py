"""How much less work a student is by its sizes, and what share of that arrived in a measured time."""

from __future__ import annotations

from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import answer_flops, prompt_flops, read_params

BOUND_BY = {"prefill": ("prompt_flops",), "decode": ("weights", "answer_flops")}
"""Phase -> the ratios of `expected_ratios` that its time can follow: a prompt is bound by arithmetic, a step by the
weights that it reads, and at large batches by arithmetic too."""


def expected_ratios(teacher: Dims, student: Dims, *, prompt: int, answer: int) -> dict[str, float]:
    """Return what the student needs, over what the teacher needs.

    ``weights``: bytes of the weights that a decoding step reads, in one number format for both. ``prompt_flops``:
    arithmetic of a prompt of `prompt` tokens; ``answer_flops``: of the `answer` tokens after it.
    """
    return {
        "weights": read_params(student) / read_params(teacher),
        "prompt_flops": prompt_flops(student, prompt) / prompt_flops(teacher, prompt),
        "answer_flops": answer_flops(student, prompt, answer) / answer_flops(teacher, prompt, answer),
    }


def arrived(measured: float, expected: float) -> float | None:
    """Return the share of the expected saving that was measured, ``(1 - measured) / (1 - expected)``.

    Both are times or work of the student over the teacher's. 1 is all of it, 0 none; below 0 the student is slower.
    None where no saving was expected.
    """
    return (1 - measured) / (1 - expected) if expected < 1 else None
