"""Timed layers are scaled to what the whole teacher took where it was profiled (`search.latency_profile`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactlm_nemo.config.model import Precision
from compactlm_nemo.config.profile import Phase
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.latency import LatencyTable

_DTYPES = {Precision.bf16: "bfloat16", Precision.fp32: "float32"}
MOST_BYTES = 2**24
"""No profile.json is larger."""


@dataclass(frozen=True)
class TeacherTime:
    """What the teacher took in one phase at the batch of `search`."""

    teacher: str
    """Fingerprint of the artifact that was profiled."""
    device: str
    milliseconds: float
    """Of the prompts up to the first token, or of a step after it."""


def read_teacher_time(config: Config) -> TeacherTime:
    """Return the teacher's time that `search.latency_profile` holds.

    Raises:
        ConfigError: the file holds none for these settings; the message names what differs.
    """
    cfg = config.search
    path, where = Path(str(cfg.latency_profile)), f"search.latency_profile={cfg.latency_profile}"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("too large")
        profile = json.loads(path.read_text(encoding="utf-8"))
        engines = {engine["engine"]: engine for engine in profile["engines"]}
        chosen = next(iter(engines)) if cfg.latency_engine is None else cfg.latency_engine.name
        measured = {
            "search.latency_engine": (chosen, [*engines]),
            "search.context": (cfg.context, [int(profile["prompt_tokens"])]),
            "model.precision": (_DTYPES[config.model.precision], [str(profile["dtype"])]),
        }
        if not _differing(measured):
            rows = {int(row["batch"]): row for row in engines[chosen]["models"]["teacher"]["batches"]}
            measured["search.batch"] = (cfg.batch, [*rows])
        if not (differing := _differing(measured)):
            name = "first_token_seconds" if cfg.latency_phase is Phase.prefill else "step_seconds"
            seconds = float(rows[cfg.batch][name]["median"])
            if not 0 < seconds < float("inf"):
                raise ValueError("a time that is not positive")
            return TeacherTime(str(profile["teacher"]), str(engines[chosen]["device"]), 1000 * seconds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where} is no profile.json of the profile stage ({reason}); name one.") from None
    raise ConfigError(f"{where} was measured with other settings ({'; '.join(differing)}); profile with these.")


def _differing(measured: dict[str, tuple[Any, list[Any]]]) -> list[str]:
    """Return what was not measured, each with what was."""
    return [
        f"{name} is {wanted} here and {' or '.join(map(str, found))} there"
        for name, (wanted, found) in measured.items()
        if wanted not in found
    ]


def profile_problems(config: Config) -> list[str]:
    """Return why the profile cannot serve, as far as the file and the settings tell."""
    layout = config.parallel
    if config.search.latency_profile is None:
        return []
    problems = []
    if layout.model_ranks > 1:
        problems.append(
            f"search.latency_profile={config.search.latency_profile} is of one device, and the layout splits a model "
            f"over {layout.model_ranks}; leave the profile out, or set parallel.tp, pp and cp to 1."
        )
    try:
        read_teacher_time(config)
    except ConfigError as error:
        problems.append(str(error))
    return problems


def refuse_other(time: TeacherTime, path: str, *, teacher: str, device: str) -> None:
    """Refuse the times of another teacher or device.

    Raises:
        ConfigError: the profile is not of this teacher on this device.
    """
    for name, here, there in (("teacher", teacher, time.teacher), ("device", device, time.device)):
        if here != there:
            raise ConfigError(
                f"search.latency_profile={path} is of the {name} {there[:40]}, not of this run's {here[:40]}; profile "
                f"this {name}, or leave it out."
            )


def scaled(table: LatencyTable, teacher: Dims, milliseconds: float) -> LatencyTable:
    """Return the table times what the teacher took over what its timed layers sum to.

    So a candidate's time is ``milliseconds * sum of its layers / sum of the teacher's``: what the engine adds to the
    layers counts as their share.
    """
    factor = milliseconds / table.milliseconds(teacher)
    times = {part: {sizes: ms * factor for sizes, ms in rows.items()} for part, rows in table.times.items()}
    return LatencyTable(table.metadata | {"scaled_by": factor, "teacher_ms": milliseconds}, times)
