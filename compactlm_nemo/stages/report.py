"""The report stage: manifests and results of the other stages become a page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def report(run: Run, folder: Path) -> dict[str, Any]:
    """Write report.md, report.html and the plots."""
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.report.markdown import write_report

    with main_rank_writes() as writes:
        if writes:
            profile = run.path("profile") if run.config.profile.engines else None
            write_report(Path(run.config.run.dir), folder, profile)
    return {}


STAGE = Stage(
    name="report",
    summary="manifests and results of all stages -> `report.html`, `report.md` and plots",
    reads=("student", "score", "search", "distill", "evaluate", "export"),
    may_read={"profile": lambda config: bool(config.profile.engines)},
    writes="report",
    settings=lambda config: {},
    run=report,
)
