"""The report stage: manifests and results of the other stages become a page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.report.markdown import write_report


def report(run: Any, folder: Path) -> dict[str, Any]:
    """report.md and its plots, from the manifests and results of the other stages."""
    with main_rank_writes() as writes:
        if writes:
            write_report(run.dir, folder)
    return {}
