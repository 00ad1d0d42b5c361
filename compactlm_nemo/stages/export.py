"""The export stage: a model of the run becomes a folder that other tools load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.export import ExportDtype, ExportedModel
from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.formats import FORMATS
from compactlm_nemo.models.read_back import read_back, read_back_problem
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    import torch

    from compactlm_nemo.report.model_card import Card
    from compactlm_nemo.stages.context import Run

ARTIFACTS = {ExportedModel.teacher: "teacher", ExportedModel.student: "student", ExportedModel.distilled: "distill"}
"""Model that leaves -> the artifact that holds it."""


KINDS = {
    ExportedModel.teacher: "The teacher itself, as it was imported.",
    ExportedModel.student: "A pruned model that has not been trained since: it is made to be trained.",
    ExportedModel.distilled: "A pruned model that the original taught.",
}
"""What a card says of them."""


def export_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return why the format cannot hold the run's models, or the Python that is to read it cannot.

    The first model is the teacher; sizes do not matter. A dry run may plan for another machine.
    """
    chosen = config.export.format
    problem = FORMATS[chosen].problem(models[0]) if models else None
    problems = [f"export.format={chosen.name}: {problem}; use export.format=hf."] if problem else []
    python = config.export.verify
    if python is not None and not config.dry_run and (missing := read_back_problem(python, chosen.name)):
        problems.append(f"export.verify={python} {missing}.")
    return problems


def export(run: Run, folder: Path) -> dict[str, Any]:
    """Write the chosen model in the chosen format, and count its parameters in the files."""
    from compactlm_nemo.errors import CheckpointError
    from compactlm_nemo.models.checkpoint import CheckpointSource
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.search.cost import num_params
    from compactlm_nemo.stages.context import HF

    cfg = run.config.export
    artifact, written = ARTIFACTS[cfg.of], FORMATS[cfg.format]
    dims, target, hf_assets = run.dims(artifact), folder / cfg.format.name, run.path("teacher") / HF
    dtype = _dtype(run, hf_assets)
    dtype_name = str(dtype).removeprefix("torch.")
    verified: dict[str, str] = {}
    with main_rank_writes() as writes:
        if writes:
            source = CheckpointSource(run.path(artifact), dims)
            written.write(hf_assets, target, dims, source, dtype, int(cfg.shard_gib * 2**30))
            _write_card(run, target, dtype_name)
            if cfg.verify is not None:
                tensors = written.tensors(dims, source, dtype)
                verified = {"verified_by": read_back(cfg.verify, cfg.format.name, target, tensors, written.tied)}
    counted, planned = written.count(target), num_params(written.held(dims))
    if counted != planned:
        raise CheckpointError(f"{target} holds {counted} parameters, the plan says {planned}.")
    return {"params": counted, "folder": str(target), "dtype": dtype_name} | verified


def _dtype(run: Run, hf_assets: Path) -> torch.dtype:
    """Return the number format that is asked for, or else the teacher's own."""
    import torch

    from compactlm_nemo.models.hf_assets import dtype_of

    by_name = {ExportDtype.fp32: torch.float32, ExportDtype.bf16: torch.bfloat16, ExportDtype.fp16: torch.float16}
    if run.config.export.dtype is not None:
        return by_name[run.config.export.dtype]
    stated = {str(dtype).removeprefix("torch."): dtype for dtype in by_name.values()}
    return stated.get(dtype_of(hf_assets) or "", run.dtype)


def _write_card(run: Run, target: Path, dtype: str) -> None:
    """Write README.md and card.json, and warn where older readers will not load the model.

    Both say what is known by now; they are never touched again, as the manifest has their hashes.
    """
    import json
    import logging

    from compactlm_nemo.artifacts import write_json
    from compactlm_nemo.models.hf_assets import CARD
    from compactlm_nemo.report.card import FILE, run_card
    from compactlm_nemo.report.figures import measured
    from compactlm_nemo.report.model_card import TEACHER_WORDS, model_card
    from compactlm_nemo.stages.context import HF

    card, teacher = _card(run, dtype), run.path("teacher")
    for remark in card.remarks:
        logging.getLogger(__name__).warning("%s: %s", target, remark)
    words = json.loads((teacher / TEACHER_WORDS).read_text()) if (teacher / TEACHER_WORDS).is_file() else {}
    (target / CARD).write_text(model_card(card, teacher / HF, words), encoding="utf-8")
    artifact, folder = ARTIFACTS[run.config.export.of], teacher.parent
    found = measured(folder, ["evaluate"]) if _is_evaluated(run) else {}
    told = run_card(folder, artifact, teacher=card.teacher, measured=found)
    write_json(target / FILE, told | {"dtype": dtype})


def _card(run: Run, dtype: str) -> Card:
    """Return what the model card tells of this run."""
    from compactlm_nemo.data.trimming import TrimmedVocabulary
    from compactlm_nemo.models.hf_assets import older_reader_problem
    from compactlm_nemo.report.model_card import Card, teacher_name
    from compactlm_nemo.search.cost import num_params

    of, config = run.config.export.of, run.config
    teacher = teacher_name(config.model.source)
    models = {teacher: run.dims("teacher")}
    if of is not ExportedModel.teacher:
        models[f"{teacher}, {of.name}"] = run.dims(ARTIFACTS[of])
    problem = older_reader_problem(run.dims(ARTIFACTS[of]))
    remarks = [] if problem is None else [problem]
    if (vocabulary := TrimmedVocabulary.load(run.path("teacher"))) is not None:
        remarks.append(
            f"the vocabulary is trimmed from {vocabulary.whole_size:,} tokens to {len(vocabulary.rows):,}, those of "
            "the texts it was made for; others are spelled with shorter tokens."
        )
    card = Card(
        teacher=teacher,
        kind=KINDS[of],
        shapes={
            name: {"parameters": num_params(dims)} | {axis: size for axis, size in dims.shape().items() if size}
            for name, dims in models.items()
        },
        dtype=dtype,
        remarks=remarks,
    )
    if of is not ExportedModel.distilled:
        return card
    texts = config.data.blend.items()
    data = {name: f"{Path(str(corpus.source)).name}, weight {corpus.share:g}" for name, corpus in texts}
    return replace(card, data=data, training=_training(run), losses=_losses(run))


def _training(run: Run) -> dict[str, Any]:
    """Return how the student was trained, from the manifest of that training."""
    from compactlm_nemo.artifacts import read_manifest

    manifest = read_manifest(run.path("distill"))
    settings = manifest["settings"]
    losses = {key: value for key, value in settings.items() if key.startswith("distill.loss.") and value}
    for shape, weight in (
        ("distill.loss.jsd_beta", "distill.loss.jsd"),
        ("distill.loss.skew", "distill.loss.skewed_kl"),
    ):
        if weight not in losses:
            losses.pop(shape, None)
    names = ("distill.teacher", "distill.steps", "distill.global_batch", "data.sequence_length", "distill.lr")
    trained = {"tokens": f"{manifest['results']['tokens']:,}"} | {name: settings[name] for name in names}
    return trained | losses | {"run.seed": manifest["seed"]}


def _losses(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the evaluate stage where it has measured this model; a card does without them else."""
    import json

    if not _is_evaluated(run):
        return []
    evaluated = run.path("distill").parent / "evaluate"
    rows: list[dict[str, Any]] = json.loads((evaluated / "results.json").read_text())
    return rows


def _is_evaluated(run: Run) -> bool:
    """Whether the model that leaves is a distilled one that the evaluate stage has measured."""
    from compactlm_nemo.artifacts import MANIFEST, read_manifest

    if run.config.export.of is not ExportedModel.distilled:
        return False
    evaluated = run.path("distill").parent / "evaluate"
    is_there = (evaluated / MANIFEST).is_file()
    return is_there and read_manifest(evaluated)["inputs"].get("distill") == run.fingerprint("distill")


def _reads(of: ExportedModel) -> dict[str, Any]:
    return {ARTIFACTS[of]: lambda config: config.export.of is of}


STAGE = Stage(
    name="export",
    summary="one model of the run (`export.of`) -> `export/hf`, a Hugging Face folder, or another `export.format`",
    reads=("teacher",),
    may_read=_reads(ExportedModel.student) | _reads(ExportedModel.distilled),
    writes="export",
    settings=lambda config: {"export": result_settings(replace(config.export, push=None))},
    problems=export_problems,
    run=export,
)
