"""Times answers of models that stand loaded side by side and take turns, so that a slow moment of the machine hits all.

Every model is in a process of its own, outside of the launch. A model answers B prompts at once: the seconds to the
first token of all are the prefill, those of the steps after it the decoding.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any, Protocol

from compactlm_nemo.errors import CompactLMError
from compactlm_nemo.evaluation.harness import environment_outside


@dataclass(frozen=True)
class Spread:
    """A spread of repeated measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        return Spread(median(values), min(values), max(values))


@dataclass(frozen=True)
class Timed:
    """One timed answer to a batch of prompts."""

    first_seconds: float
    """Until every prompt has its first token."""
    step_seconds: float
    """Of one step after it, which gives every prompt one more token; the mean over the steps."""
    generated: int
    """Tokens of all answers, counted in what came back."""
    seconds: float
    """From the prompts to the last token."""


class Served(Protocol):
    """A loaded model."""

    about: dict[str, Any]
    """Device, threads and version of what generates."""
    disk_bytes: int
    """Weights on disk, in the form that it reads."""

    def answer(self, batch: int, turn: int) -> Timed:
        """Time the answer to `batch` prompts; equal turns of all models have equal prompts."""
        ...

    def peak_bytes(self) -> int | None:
        """Return the most bytes of memory so far, None where that says nothing of the model."""
        ...

    def close(self) -> None: ...


class Child:
    """A model in a process that `evaluation.generating` runs."""

    def __init__(
        self,
        name: str,
        engine: str,
        folder: Path,
        prompts: list[list[int]],
        new_tokens: int,
        *,
        dtype: str,
        threads: int,
        largest_batch: int,
    ) -> None:
        self._name, self._prompts, self._new_tokens = f"{engine} with the {name}", prompts, new_tokens
        self._peak: int | None = None
        self.disk_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        asked = {"engine": engine, "folder": str(folder), "dtype": dtype, "threads": threads, "batch": largest_batch}
        self._messages: IO[str] = tempfile.TemporaryFile("w+")
        # A session of its own: Ctrl-C asks this process to stop, which ends the other one by the end of its input.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compactlm_nemo.evaluation.generating", json.dumps(
                asked | {"length": len(prompts[0]) + new_tokens}
            )],
            env=environment_outside() | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True, start_new_session=True,
        )  # fmt: skip
        self.about = self._read()

    def _read(self) -> dict[str, Any]:
        """Return the next line of the process; raise with its last words where there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            told: dict[str, Any] = json.loads(line)
            return told
        self._process.wait()
        self._messages.seek(0)
        last = (self._messages.read().strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]
        raise CompactLMError(f"profile.engines: {self._name} failed: {last}")

    def answer(self, batch: int, turn: int) -> Timed:
        prompts = [self._prompts[(turn * batch + i) % len(self._prompts)] for i in range(batch)]
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": self._new_tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # told by what is read
        told = self._read()
        check_counts(self._name, told["counts"], batch, self._new_tokens)
        self._peak = told["peak_bytes"]
        first, decode = told["first_seconds"], told["decode_seconds"]
        return Timed(first, decode / (self._new_tokens - 1), sum(told["counts"]), first + decode)

    def peak_bytes(self) -> int | None:
        return self._peak

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._messages.close()


def check_counts(name: str, counts: list[int], batch: int, new_tokens: int) -> None:
    """Refuse an answer with other numbers of tokens than were asked for.

    Raises:
        CompactLMError: a prompt has no answer, or one of another length.
    """
    if counts != [new_tokens] * batch:
        raise CompactLMError(
            f"profile.engines: {name} generated {counts} tokens, not {new_tokens} for each of {batch} prompts; its "
            "times would be those of other work."
        )


def take_turns(
    models: Mapping[str, Served], batches: list[int], repeats: int, done: Callable[[int], None]
) -> dict[str, dict[int, list[Timed]]]:
    """Return model -> batch -> timed answers, in the order of the turns; a first answer of each is not kept.

    In every other turn the models come in the opposite order, so that none gains by its place.

    Args:
        done: Called with 1 after every answer, warm-up included.
    """
    found: dict[str, dict[int, list[Timed]]] = {name: {batch: [] for batch in batches} for name in models}
    for batch in batches:
        for turn in range(repeats + 1):
            names = list(models)
            for name in names if turn % 2 else reversed(names):
                timed = models[name].answer(batch, turn)
                if turn:
                    found[name][batch].append(timed)
                done(1)
    return found


def summary(batch: int, timed: list[Timed]) -> dict[str, Any]:
    """Return the figures of a model at one batch, each as median, lowest and highest over the repeats."""
    figures = {
        "first_token_seconds": [each.first_seconds for each in timed],
        "step_seconds": [each.step_seconds for each in timed],
        "decode_tokens_per_second": [batch / each.step_seconds for each in timed],
        "tokens_per_second": [each.generated / each.seconds for each in timed],
    }
    spreads = {name: dataclasses.asdict(Spread.of(values)) for name, values in figures.items()}
    return {"batch": batch, "generated_tokens": timed[0].generated} | spreads


def ratios(teacher: list[Timed], student: list[Timed]) -> dict[str, Spread]:
    """Return phase -> the student's time over the teacher's, turn by turn: both of a turn met the same moment."""
    pairs = list(zip(teacher, student, strict=True))
    return {
        "prefill": Spread.of([after.first_seconds / before.first_seconds for before, after in pairs]),
        "decode": Spread.of([after.step_seconds / before.step_seconds for before, after in pairs]),
    }
