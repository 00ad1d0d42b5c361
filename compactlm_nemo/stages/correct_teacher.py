"""The correct_teacher stage: the teacher is trained a little on the tokens that the student will see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compactlm_nemo.errors import require
from compactlm_nemo.stages.context import Run
from compactlm_nemo.stages.distill import _train


def correct_teacher(run: Run, folder: Path) -> dict[str, Any] | None:
    """Teacher + tokens -> the teacher, trained a little on the tokens that the student will see.

    Source: "LLM Pruning and Distillation in Practice" (arXiv 2408.11796), section 2.1.
    """
    require(
        run.config.corrects_before, "correct.while_distilling=true trains the teacher in recipes.distill; run that."
    )
    return _train(run, folder, run.config.correction, source="teacher", state=run.dir / "correcting")
