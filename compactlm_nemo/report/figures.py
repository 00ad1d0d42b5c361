"""Reads what a run has measured, whoever measured it: each number under its name, by model, with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from compactlm_nemo.artifacts import MANIFEST, file_problems, read_manifest, refuse_damage
from compactlm_nemo.errors import CheckpointError

TEACHER, PRUNED, DISTILLED = "teacher", "pruned", "distilled"
PARAMS, FORWARD_SPEED = "params", "forward_speed"
SERVED = {
    "tokens_per_second": "speed", "decode_tokens_per_second": "decode_speed", "first_token_seconds": "first_token",
    "peak_bytes": "memory", "disk_bytes": "disk",
}  # fmt: skip
"""Key of the profile stage -> kind of metric: `speed/ENGINE/BATCH`, `memory/ENGINE`."""
RESULTS, QUALITY, PROFILE = "results.json", "quality.json", "profile.json"


def is_slice(metric: str) -> bool:
    """Whether a metric is of a part of a text, as `loss/wiki/short`; tables leave those out."""
    kind, _, rest = metric.partition("/")
    return "/" in rest and kind not in SERVED.values()


class Figure(NamedTuple):
    """A `Figure` is a number with the ends of its 95 % interval, None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measured:
    """A `Measured` is one metric of the models of a run."""

    name: str
    models: dict[str, Figure] = field(default_factory=dict)
    """A model for which the number does not exist, as a mean over nothing, is not in it."""
    against_teacher: dict[str, Figure] = field(default_factory=dict)
    """Model -> how far it lies above the teacher, paired by unit where units were counted."""

    def ratio(self, model: str) -> Figure | None:
        """Return a model's share of the teacher's number; None where one is missing or the teacher's is not above 0."""
        if model not in self.models or TEACHER not in self.models or self.models[TEACHER].value <= 0:
            return None
        return Figure(self.models[model].value / self.models[TEACHER].value)


def measured(run: Path, artifacts: Collection[str] = ("evaluate", "profile")) -> dict[str, Measured]:
    """Return every metric of a run by its name, of what the evaluate and the profile stage have left; none without.

    Of a loss that both files of the evaluate stage have, the one with an interval is taken.

    Args:
        artifacts: Those of the two that count.

    Raises:
        CheckpointError: a file is damaged, or of another student than the run has now.
    """
    found: dict[str, Measured] = {}
    if "evaluate" in artifacts and _is_of(run, "evaluate", "distill"):
        found |= _read(run / "evaluate" / RESULTS, _of_rows)
        if (run / "evaluate" / QUALITY).is_file():
            found |= _read(run / "evaluate" / QUALITY, _of_quality)
    if "profile" in artifacts and _is_of(run, "profile", "export"):
        found |= _read(run / "profile" / PROFILE, _of_profile)
    return found


def _is_of(run: Path, artifact: str, source: str) -> bool:
    """Whether a finished artifact is there; refuse one that is damaged, or made from another source than there is."""
    folder = run / artifact
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    refuse_damage(folder, file_problems(folder, manifest["outputs"]))
    if (run / source / MANIFEST).is_file():
        now, then = read_manifest(run / source)["fingerprint"], manifest["inputs"].get(source)
        if then not in (None, now):
            raise CheckpointError(f"{folder} is of another student than {run / source}; delete it and run again.")
    return True


def _read(path: Path, parse: Any) -> dict[str, Measured]:
    try:
        return {metric.name: metric for metric in parse(json.loads(path.read_text(encoding="utf-8")))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} is not as it is written ({problem}); delete {path.parent} and run again."
        ) from None


def _of_rows(rows: list[dict[str, Any]]) -> Iterator[Measured]:
    """Yield losses, tasks, size and speed of the rows of the evaluate stage; their numbers have no interval."""
    for key in rows[0]:
        if name := _row_metric(key):
            models = {row["model"]: Figure(float(row[key])) for row in rows if _is_number(row.get(key))}
            yield Measured(name, models, _drift(models))


def _row_metric(key: str) -> str | None:
    named = {"params": PARAMS, "forward_tokens_per_second": FORWARD_SPEED}
    kind, _, rest = key.partition("_")
    return named.get(key) or (f"{kind}/{rest}" if kind in ("loss", "task") and rest else None)


def _drift(models: dict[str, Figure]) -> dict[str, Figure]:
    """Return how far each model lies above the teacher, where no units were counted."""
    if TEACHER not in models:
        return {}
    base = models[TEACHER].value
    return {model: Figure(figure.value - base) for model, figure in models.items() if model != TEACHER}


def _of_quality(quality: dict[str, Any]) -> Iterator[Measured]:
    """Yield the metrics of `evaluation.metric.summarise`."""
    for metric in quality["metrics"]:
        parts = [
            {model: _figure(told) for model, told in metric[part].items() if _is_number(told["value"])}
            for part in ("models", "against_teacher")
        ]
        yield Measured(str(metric["metric"]), *parts)


def _of_profile(profile: dict[str, Any]) -> Iterator[Measured]:
    """Yield speed and memory of the exported student and of the teacher; repeats spread, but are no interval."""
    student = {"student": PRUNED}.get(profile["exported"], profile["exported"])
    for engine in profile["engines"]:
        values: dict[str, dict[str, Figure]] = {}
        for label, told in engine["models"].items():
            model = {"student": student}.get(label, label)
            timed = {
                f"{key}/{row['batch']}": row[key]["median"] for row in told["batches"] for key in row if key in SERVED
            }
            for key, value in {**timed, **{key: told[key] for key in told if key in SERVED}}.items():
                kind, _, batch = key.partition("/")
                name = "/".join([SERVED[kind], engine["engine"], *([batch] if batch else [])])
                if _is_number(value):
                    values.setdefault(name, {})[model] = Figure(float(value))
        yield from (Measured(name, models, _drift(models)) for name, models in values.items())


def _figure(told: dict[str, Any]) -> Figure:
    low, high = (float(told[end]) if _is_number(told[end]) else None for end in ("low", "high"))
    return Figure(float(told["value"]), low, high)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
