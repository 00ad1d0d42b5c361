"""The correct_teacher stage: the teacher is trained a little on the tokens that the student will see.

Source: "LLM Pruning and Distillation in Practice" (arXiv 2408.11796), section 2.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.fingerprint import result_settings, training_text
from compactlm_nemo.errors import require
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def correct_teacher(run: Run, folder: Path) -> dict[str, Any] | None:
    """Train the teacher on the tokens that the student will see."""
    require(
        run.config.corrects_before, "correct.while_distilling=true trains the teacher in recipes.distill; run that."
    )
    from compactlm_nemo.stages.training_run import train

    return train(run, folder, run.config.correction, source="teacher")


STAGE = Stage(
    name="correct_teacher",
    summary="teacher and tokens -> the teacher, trained a little on the tokens that the student will see",
    reads=("teacher", "tokens"),
    writes="corrected",
    settings=lambda config: {"correct": result_settings(config.correction)} | training_text(config),
    is_wanted=lambda config: config.corrects_before,
    run=correct_teacher,
)
