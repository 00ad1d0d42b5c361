"""The evaluate stage: quality, size, speed and tasks of teacher, pruned and distilled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.fingerprint import heldout_loss, result_settings
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.questions import question_files, question_problems
from compactlm_nemo.evaluation.harness import harness_problem
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.evaluation.heldout import HeldoutQuality
    from compactlm_nemo.evaluation.metric import Measurement
    from compactlm_nemo.stages.context import Run


def evaluate_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return what is wrong with the held-out tokens, the files of questions, the continuations and the tasks."""
    problems = []
    if config.evaluate.tokens < config.data.sequence_length:
        problems.append(
            f"evaluate.tokens={config.evaluate.tokens} is less than one window of "
            f"data.sequence_length={config.data.sequence_length}; raise it."
        )
    problems += question_problems(config.evaluate)
    continued = config.evaluate.continuations
    positions = min((dims.max_position_embeddings for dims in models), default=None)
    if continued.prompts and positions is not None and continued.prompt_tokens + continued.tokens > positions:
        problems.append(
            f"evaluate.continuations: prompt_tokens={continued.prompt_tokens} and tokens={continued.tokens} are more "
            f"than the model's {positions} positions; lower either."
        )
    if problem := harness_problem(config.evaluate):
        problems.append(problem)
    return problems


def evaluate(run: Run, folder: Path) -> dict[str, Any]:
    """Measure quality, size, forward speed and lm-eval tasks of teacher, pruned and distilled model.

    Each model is loaded once and shown to every measurement; no two are there together.
    """
    from compactlm_nemo.artifacts import read_manifest, write_json
    from compactlm_nemo.evaluation.metric import summarise
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.search.cost import num_params

    trained = read_manifest(run.path("distill"))["results"]["tokens"]
    models = (("teacher", "teacher", 0), ("pruned", "student", 0), ("distilled", "distill", trained))
    heldout = _heldout_quality(run)
    measurements = _measurements(run, heldout)
    rows = []
    for label, artifact, tokens in models:
        _show(run, label, artifact, measurements)
        row = {"model": label, "params": num_params(run.dims(artifact)), "tokens_trained": tokens}
        rows.append(row | _heldout_losses(heldout, label))
    draws = {"resamples": run.config.evaluate.resamples, "seed": run.config.run.seed}
    with main_rank_writes() as writes:
        if writes:
            metrics = [metric for measurement in measurements.values() for metric in measurement.metrics()]
            details = {name: measurement.details() for name, measurement in measurements.items()}
            quality = draws | {"metrics": summarise(metrics, **draws), "details": details}
            write_json(folder / "quality.json", quality)
            for row, (_, artifact, _) in zip(rows, models, strict=True):
                row |= _task_results(run, artifact, folder / "as_hf")
            write_json(folder / "results.json", rows)
    return {"recovered": {name: _recovered(rows, f"loss_{name}") for name in run.config.data.heldout}}


def _measurements(run: Run, heldout: HeldoutQuality) -> dict[str, Measurement]:
    """Return what is measured of each model, by the name of its part of the details."""
    return {"heldout": heldout} | _question_measurements(run) | _continuations(run)


def _question_measurements(run: Run) -> dict[str, Measurement]:
    """Return the measurements of the files of questions, which are tokenised here, before any model is loaded."""
    cfg = run.config.evaluate
    if not cfg.choices and not cfg.bias:
        return {}
    from compactlm_nemo.config.data import SpecialTokens
    from compactlm_nemo.data.documents import DocumentEncoder
    from compactlm_nemo.data.questions import read_bias, read_choices
    from compactlm_nemo.data.tokenizer import load_tokenizer
    from compactlm_nemo.evaluation.bias import Bias
    from compactlm_nemo.evaluation.choices import Choices
    from compactlm_nemo.evaluation.likelihood import PairEncoder
    from compactlm_nemo.progress import progress_bar
    from compactlm_nemo.stages.context import HF

    dims = run.dims("teacher")
    documents = DocumentEncoder(
        tokenizer=load_tokenizer(run.path("teacher") / HF),
        eod=run.document_end,
        vocab_size=dims.vocab_size,
        parses_special_tokens=run.config.data.special_tokens is SpecialTokens.parse,
    )
    encoder = PairEncoder(documents=documents, start=run.window_start, max_positions=dims.max_position_embeddings)
    others: dict[str, Any] = {"batch_tokens": _batch_tokens(run), "bar": progress_bar}
    choices = [Choices(name, read_choices(Path(file)), encoder, **others) for name, file in cfg.choices.items()]
    bias = [Bias(name, read_bias(Path(file)), encoder, **others) for name, file in cfg.bias.items()]
    return {each.name: each for each in choices} | {each.name: each for each in bias}


def _continuations(run: Run) -> dict[str, Measurement]:
    """Return the measurement of continuations of held-out documents, where it is asked for."""
    cfg = run.config.evaluate.continuations
    if cfg.prompts == 0:
        return {}
    from compactlm_nemo.data.prompts import document_beginnings
    from compactlm_nemo.data.tokenizer import load_tokenizer
    from compactlm_nemo.evaluation.continuations import Continuations
    from compactlm_nemo.progress import progress_bar
    from compactlm_nemo.stages.context import HF

    tokenizer = load_tokenizer(run.path("teacher") / HF)
    prefixes = [run.token_prefix(f"heldout.{name}") for name in run.config.data.heldout]
    measurement = Continuations(
        document_beginnings(prefixes, cfg.prompts, cfg.prompt_tokens, run.window_start),
        cfg.tokens,
        {run.document_end, tokenizer.eos_token_id} - {None},
        lambda ids: str(tokenizer.decode(ids)),
        batch_tokens=_batch_tokens(run),
        bar=progress_bar,
    )
    return {measurement.name: measurement}


def _batch_tokens(run: Run) -> int:
    """Return the most tokens of a forward pass on one rank: as many as held-out windows have in one."""
    return run.config.evaluate.micro_batch * run.config.data.sequence_length


def _heldout_quality(run: Run) -> HeldoutQuality:
    """Return the measurement of the held-out texts."""
    from compactlm_nemo.data.tokenizer import load_tokenizer
    from compactlm_nemo.data.windows import token_counts
    from compactlm_nemo.evaluation.heldout import HeldoutQuality
    from compactlm_nemo.progress import progress_bar
    from compactlm_nemo.stages.context import HF

    config = run.config
    return HeldoutQuality(
        {name: run.heldout_text(name, config.evaluate.tokens) for name in config.data.heldout},
        token_counts=lambda: token_counts(run.train_corpora(), run.dims("teacher").vocab_size),
        decode=lambda ids: str(load_tokenizer(run.path("teacher") / HF).decode(ids)),
        micro_batch=config.evaluate.micro_batch,
        bar=progress_bar,
    )


def _show(run: Run, label: str, artifact: str, measurements: dict[str, Measurement]) -> None:
    """Load a model and show it to every measurement; nothing of it is left but what these keep. Collective."""
    model = run.load(artifact)
    for measurement in measurements.values():
        measurement.measure(label, model)


def _heldout_losses(heldout: HeldoutQuality, label: str) -> dict[str, float]:
    """Return the LM loss on each held-out text, and the best forward speed."""
    from compactlm_nemo.stages.context import check_loss

    row: dict[str, float] = {}
    for name, result in heldout.results[label].items():
        check_loss(result.loss_nats, f"{label} on {name}")
        row |= {f"loss_{name}": result.loss_nats, f"tokens_{name}": result.tokens}
    return row | {"forward_tokens_per_second": max(each.tokens_per_second for each in heldout.results[label].values())}


def _task_results(run: Run, artifact: str, scratch: Path) -> dict[str, float]:
    """Return lm-eval's results of an artifact's model, exported for the purpose; none without tasks."""
    if not run.config.evaluate.tasks:
        return {}
    import shutil

    from compactlm_nemo.evaluation.harness import run_tasks
    from compactlm_nemo.models.checkpoint import CheckpointSource
    from compactlm_nemo.models.hf import export_hf
    from compactlm_nemo.stages.context import HF

    dims = run.dims(artifact)
    export_hf(run.path("teacher") / HF, scratch, dims, CheckpointSource(run.path(artifact), dims), run.dtype)
    values = run_tasks(scratch, run.config.evaluate)
    shutil.rmtree(scratch)
    return {f"task_{name}": value for name, value in values.items()}


def _recovered(rows: list[dict[str, Any]], key: str) -> float | None:
    """Return how much of the gap between teacher's and pruned model's loss is closed, 0 to 1; None without a gap."""
    teacher, pruned, distilled = (row[key] for row in rows)
    return None if pruned == teacher else (pruned - distilled) / (pruned - teacher)


def _settings(config: Config) -> dict[str, Any]:
    """Return what decides the losses, which tokens end a document, and the draws of the intervals."""
    others = {"data.document_end": config.data.document_end, "run.seed": config.run.seed}
    return {"evaluate": result_settings(config.evaluate)} | others | heldout_loss(config)


STAGE = Stage(
    name="evaluate",
    summary="teacher, pruned and distilled student -> `results.json`: losses, sizes, speed, tasks; `quality.json`: "
    "metrics with intervals",
    reads=("teacher", "tokens", "student", "distill"),
    writes="evaluate",
    settings=_settings,
    files=lambda config: question_files(config.evaluate),
    problems=evaluate_problems,
    run=evaluate,
)
