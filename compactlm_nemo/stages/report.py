"""The report stage: manifests and results of the other stages become a page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.export import ExportedModel
from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.report.gate import gate_problems, plan_lines
from compactlm_nemo.stages.export import ARTIFACTS
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


_MEASURED = ("evaluate", "export", "profile")
"""Artifacts whose fingerprints the card adds to those of what the model was made of."""


def report(run: Run, folder: Path) -> dict[str, Any]:
    """Write report.md, report.html, the plots and card.json."""
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.report.markdown import write_report

    run_dir, limits = Path(run.config.run.dir), run.config.gate.limits
    with main_rank_writes() as writes:
        if writes:
            profile = run.path("profile") if run.config.profile.engines else None
            price_hour = run.config.cluster.price_hour
            write_report(run_dir, folder, limits=limits, profile=profile, price_hour=price_hour)
            _write_card(run, run_dir, folder)
    return {}


def _write_card(run: Run, run_dir: Path, folder: Path) -> None:
    """Write card.json: what the exported folder's own says, with all that was measured, and the verdict of the gate."""
    from compactlm_nemo.artifacts import read_manifest, write_json
    from compactlm_nemo.report.card import FILE, run_card
    from compactlm_nemo.report.figures import measured
    from compactlm_nemo.report.gate import as_json, judge
    from compactlm_nemo.report.model_card import teacher_name

    exported, limits = read_manifest(run.path("export")), run.config.gate.limits
    found = measured(run_dir)
    card = run_card(
        run_dir,
        ARTIFACTS[ExportedModel[exported["settings"]["export.of"]]],
        teacher=teacher_name(run.config.model.source),
        measured=found,
        inputs={name: run.fingerprint(name) for name in run.stage.artifacts(run.config) if name in _MEASURED},
    )
    verdict = as_json(judge(limits, found, run_dir)) if limits else None
    write_json(folder / FILE, card | {"dtype": exported["results"]["dtype"], "gate": verdict})


STAGE = Stage(
    name="report",
    summary="manifests and results of all stages -> `report.html`, `report.md`, plots and `card.json`",
    reads=("student", "score", "search", "distill", "evaluate", "export"),
    may_read={"profile": lambda config: bool(config.profile.engines)},
    writes="report",
    settings=lambda config: {"gate": result_settings(config.gate)},
    problems=lambda config, models: gate_problems(config.gate.limits, config),
    plan=lambda config: plan_lines(config.gate.limits),
    run=report,
)
