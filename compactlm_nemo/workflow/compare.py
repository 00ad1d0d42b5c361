"""Compares runs, finished or not: what each measured against size, speed and tokens, and which settings differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from compactlm_nemo.artifacts import MANIFEST, atomic_write_text, read_manifest, write_json
from compactlm_nemo.config.compare import CompareRunsConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.report.card import without_folders
from compactlm_nemo.report.figures import (
    DISTILLED,
    FORWARD_SPEED,
    PARAMS,
    TEACHER,
    Figure,
    Measured,
    is_slice,
    measured,
)
from compactlm_nemo.report.tables import comparison_markdown, print_comparison, print_table
from compactlm_nemo.workflow.stage_table import MAKERS, STAGES
from compactlm_nemo.workflow.status import steps_done

NAME = "compare"
_DIGEST_LETTERS = 12


@dataclass(frozen=True)
class ComparedRun:
    """A `ComparedRun` is what a run's folder holds by now."""

    name: str
    folder: Path
    manifests: dict[str, dict[str, Any]]
    """Of the finished stages, by artifact, in order."""
    metrics: dict[str, Measured]

    @property
    def stands(self) -> str:
        """The last stage that is begun, and how far it is."""
        if "report" in self.manifests:
            return "done"
        done = next((MAKERS[artifact].name for artifact in reversed(self.manifests)), None)
        progress = self.folder / "progress" / "distill"
        if "distill" not in self.manifests and progress.is_dir():
            _, steps, whole, _ = steps_done(progress)
            return f"distill at step {steps}" + (f" of {whole}" if whole else "")
        return f"up to {done}" if done else "begun"

    @property
    def teacher(self) -> str | None:
        """The identity of the teacher, whatever it is called; None before it is imported."""
        return self.manifests["teacher"]["fingerprint"][:_DIGEST_LETTERS] if "teacher" in self.manifests else None

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that decided a result, and the hash of every file of the user's."""
        flat: dict[str, Any] = {}
        trained = self.folder / "progress" / "distill" / "settings.json"
        if "distill" not in self.manifests and trained.is_file():
            flat |= {key: value for key, value in json.loads(trained.read_text()).items() if "." in key}
        for artifact, manifest in self.manifests.items():
            for key, value in without_folders(manifest["settings"]).items():
                # A stage of its own may train with another value, as that of the teacher's correction.
                flat[key if flat.get(key, value) == value else f"{artifact}: {key}"] = value
            files = {key: value for key, value in manifest["inputs"].items() if key not in MAKERS}
            flat |= {f"input {key}": value[:_DIGEST_LETTERS] for key, value in files.items()}
        return flat

    def row(self, metrics: list[str]) -> dict[str, Any]:
        """Return the run's line of the table: its student, with the interval of each number that has one."""
        return {
            "run": self.name,
            "stands": self.stands,
            "teacher": self.teacher,
            "parameters": self._params,
            "tokens trained": self._tokens,
            "validation loss": self._validation_loss,
            "forward tokens/s": _rounded(self._figure(FORWARD_SPEED)),
            **{metric: _told(self._figure(metric)) for metric in metrics},
        }

    def as_json(self, metrics: list[str]) -> dict[str, Any]:
        """Return the run's part of compare.json."""
        figures = {name: figure for name in metrics if (figure := self._figure(name)) is not None}
        row = {key: value for key, value in self.row([]).items() if key != "run"}
        return {
            "run": self.name,
            **{key.replace(" ", "_").replace("/", "_per_"): value for key, value in row.items()},
            "metrics": {name: figure._asdict() for name, figure in figures.items()},
            "against_teacher": {
                name: drift._asdict()
                for name in figures
                if (drift := self.metrics[name].against_teacher.get(DISTILLED)) is not None
            },
        }

    def _figure(self, metric: str, model: str = DISTILLED) -> Figure | None:
        return self.metrics[metric].models.get(model) if metric in self.metrics else None

    @property
    def _params(self) -> int | None:
        return self.manifests["student"]["results"]["params"] if "student" in self.manifests else None

    @property
    def _tokens(self) -> int | None:
        if "distill" in self.manifests:
            tokens: int = self.manifests["distill"]["results"]["tokens"]
            return tokens
        progress = self.folder / "progress" / "distill"
        _, steps, _, step_tokens = steps_done(progress) if progress.is_dir() else ({}, 0, None, 0)
        return steps * step_tokens or None

    @property
    def _validation_loss(self) -> float | None:
        """Loss of the student on windows of the training text: when trained, or else when cut."""
        for artifact, key in (("distill", "loss"), ("student", "loss_after")):
            if artifact in self.manifests:
                loss: float | None = self.manifests[artifact]["results"].get(key)
                return loss
        return None

    def teacher_row(self, metrics: list[str]) -> dict[str, Any]:
        """Return the line of the run's teacher."""
        params = self._figure(PARAMS, TEACHER)
        told = {metric: _told(self._figure(metric, TEACHER)) for metric in metrics}
        return {
            "run": f"teacher of {self.name}",
            "stands": None,
            "teacher": self.teacher,
            "parameters": None if params is None else int(params.value),
            "tokens trained": None,
            "validation loss": self.manifests["student"]["results"]["loss_before"],
            "forward tokens/s": _rounded(self._figure(FORWARD_SPEED, TEACHER)),
            **told,
        }

    def points(self, model: str = DISTILLED) -> list[dict[str, Any]]:
        """Return what is drawn of the student, or of the teacher: its loss on each text and what it costs."""
        is_teacher = model == TEACHER
        params, speed = self._figure(PARAMS, model), self._figure(FORWARD_SPEED, model)
        costs = {
            "params": None if params is None else params.value,
            "tokens": None if is_teacher else self._tokens,
            "speed": None if speed is None else speed.value,
        }
        return [
            {"run": self.name, "is_teacher": is_teacher, "text": text, "lm_loss_nats": figure.value, **costs}
            for name in self.metrics
            for kind, _, text in [name.partition("/")]
            if kind == "loss" and not is_slice(name) and (figure := self._figure(name, model)) is not None
        ]


def compare_runs(config: CompareRunsConfig, console: Console) -> None:
    """Print the table of runs and what they differ in, and write both where `out` says.

    Raises:
        ConfigError: a folder holds no run.
        CheckpointError: an artifact of a run is damaged.
    """
    folders = [Path(folder) for folder in config.runs]
    if nothing := [folder for folder in folders if not _manifests(folder) and not (folder / "progress").is_dir()]:
        raise ConfigError(f"runs={', '.join(map(str, nothing))} holds no run; name the folder that a recipe wrote to.")
    runs = [read_run(folder) for folder in folders]
    if config.dry_run:
        return
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics if name not in (PARAMS, FORWARD_SPEED)))
    in_table = [name for name in metrics if not is_slice(name)]
    rows = [*_teacher_rows(runs, in_table), *(run.row(in_table) for run in runs)]
    differing, remarks = differing_settings(runs), remarks_on(runs)
    print_comparison(console, "Runs", rows, "run")
    if differing:
        print_table(console, "Settings that differ", differing)
    for line in [*remarks, *([] if differing else ["the settings that decide results are the same"])]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if config.out is None:
        return
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    told = {"runs": [run.as_json(metrics) for run in runs], "differences": differing, "remarks": remarks}
    write_json(out / f"{NAME}.json", told)
    is_drawn = _plot(runs, out / f"{NAME}.png")
    atomic_write_text(out / f"{NAME}.md", _page(rows, differing, remarks, is_drawn))
    console.print(f"compared: {out / NAME}.md", soft_wrap=True, markup=False, highlight=False)
    _log(config, out, rows)


def read_run(folder: Path) -> ComparedRun:
    """Return what a run's folder holds by now."""
    return ComparedRun(str(folder), folder, _manifests(folder), measured(folder))


def _manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the manifests of the finished stages, by artifact, in order."""
    return {
        stage.writes: read_manifest(folder / stage.writes)
        for stage in STAGES.values()
        if (folder / stage.writes / MANIFEST).is_file()
    }


def _teacher_rows(runs: list[ComparedRun], metrics: list[str]) -> list[dict[str, Any]]:
    """Return a line for each teacher, and for each other measurement of it, as on other texts."""
    seen: list[dict[str, Any]] = []
    for run in runs:
        if PARAMS in run.metrics and "student" in run.manifests:
            row = run.teacher_row(metrics)
            same = [{key: value for key, value in each.items() if key not in _OF_THE_DAY} for each in (row, *seen)]
            if same[0] not in same[1:]:
                seen.append(row)
    return seen


_OF_THE_DAY = ("run", "forward tokens/s")
"""What two measurements of one teacher may differ in."""


def differing_settings(runs: list[ComparedRun]) -> list[dict[str, Any]]:
    """Return a line for each setting, and each file, that is not the same in all runs: its value in each."""
    by_run = {run.name: run.settings for run in runs}
    keys = sorted({key for settings in by_run.values() for key in settings})
    rows = []
    for key in keys:
        values = [json.dumps(settings.get(key), sort_keys=True) for settings in by_run.values()]
        if len(set(values)) > 1:
            told = {name: _value(settings[key]) if key in settings else None for name, settings in by_run.items()}
            rows.append({"setting": key, **told})
    return rows


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def remarks_on(runs: list[ComparedRun]) -> list[str]:
    """Return what keeps numbers of these runs from being compared as they stand."""
    remarks = []
    teachers = {run.name: run.teacher for run in runs if run.teacher is not None}
    if len(set(teachers.values())) > 1:
        named = ", ".join(f"{name} of {teacher}" for name, teacher in teachers.items())
        remarks.append(f"the teachers differ ({named}): a loss a token means another thing with another tokenizer.")
    inputs = [
        {key: value for key, value in run.manifests["tokens"]["inputs"].items() if key.startswith("data.heldout.")}
        for run in runs
        if "tokens" in run.manifests
    ]
    for text in sorted({key for each in inputs for key in each}):
        if len({each[text] for each in inputs if text in each}) > 1:
            remarks.append(f"{text} is another file in some of the runs: their numbers on it are not of one text.")
    lengths = {run.settings.get("evaluate.tokens") for run in runs if "evaluate" in run.manifests}
    if len(lengths) > 1:
        remarks.append("evaluate.tokens differs: the losses are over other parts of the texts.")
    return remarks


def _told(figure: Figure | None) -> str | None:
    """Return a number with its interval as a cell shows it."""
    if figure is None:
        return None
    interval = "" if figure.low is None or figure.high is None else f" [{figure.low:.4g}, {figure.high:.4g}]"
    return f"{figure.value:.4g}{interval}"


def _rounded(figure: Figure | None) -> int | None:
    return None if figure is None else round(figure.value)


def _plot(runs: list[ComparedRun], path: Path) -> bool:
    """Plot losses over parameters, tokens and speed, the teachers' too; return whether any run has one."""
    from compactlm_nemo.report.tradeoff_plot import plot_tradeoffs

    students = [point for run in runs for point in run.points()]
    teachers = {(run.teacher, point["text"]): point for run in reversed(runs) for point in run.points(TEACHER)}
    if students:
        plot_tradeoffs([*students, *teachers.values()], path)
    return bool(students)


def _page(rows: list[dict[str, Any]], differing: list[dict[str, Any]], remarks: list[str], is_drawn: bool) -> str:
    lines = ["# Runs compared", "", comparison_markdown(rows).rstrip(), ""]
    lines += ["A number in brackets is an end of the 95 % interval.", ""]
    lines += [f"- {remark}" for remark in remarks] + [""] * bool(remarks)
    if is_drawn:
        lines += [f"![Held-out loss over parameters, tokens trained and forward speed]({NAME}.png)", ""]
    lines += ["## Settings that differ", "", comparison_markdown(differing).rstrip() if differing else "None."]
    return "\n".join(lines) + "\n"


def _log(config: CompareRunsConfig, out: Path, rows: list[dict[str, Any]]) -> None:
    from compactlm_nemo.config.run import WandbMode
    from compactlm_nemo.training.wandb_run import log_table

    if config.wandb.mode is not WandbMode.disabled:
        log_table(out, config.wandb.mode, config.wandb, config.wandb.name, NAME, rows)
