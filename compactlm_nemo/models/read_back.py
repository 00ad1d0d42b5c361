"""Lets the tool that will read an exported folder prove that it reads the model that was exported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.models import readers

if TYPE_CHECKING:
    from torch import Tensor

_OF_A_LAUNCH = ("TORCHELASTIC_", "SLURM_", "PMI_", "PMIX_", "OMPI_", "LOCAL_", "GROUP_", "ROLE_")
_OF_A_RANK = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONHOME")
"""Variables that would tell the tool that it is a rank of our run."""


def read_back_problem(python: str, kind: str) -> str | None:
    """Return why an interpreter cannot read a format, as far as the name of a package tells; None where it can."""
    name = readers.PACKAGES[kind].partition(".")[0]
    ask = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, env=_environment(), timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "no answer within a minute"
        return f"cannot be run ({reason}); name the Python of an environment with {readers.PACKAGES[kind]}"
    if done.returncode:
        return f"has no package {name}, which reads export.format={kind}; install it there, or name another Python"
    return None


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_OF_A_LAUNCH) and k not in _OF_A_RANK}
    return kept | {"HF_HUB_OFFLINE": "1"}


def read_back(python: str, kind: str, folder: Path, ours: Iterable[tuple[str, Tensor]], tied: tuple[str, str]) -> str:
    """Compare every weight that a tool reads from a folder with ours, by number format, shape and bytes.

    Args:
        python: Interpreter of the environment that has the tool.
        kind: Name of the format.
        ours: Weights under the tool's names, each asked for once.
        tied: Names of embedding and output layer; the tool may have the second where we have none, if it is equal.
    Returns:
        Name and version of the tool.
    Raises:
        ConfigError: the tool is not there.
        CheckpointError: it cannot load the folder.
        RuntimeError: it reads another weight.
    """
    where = f"export.verify={python}"
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "weights.json"
        command = [python, str(Path(readers.__file__).resolve()), kind, str(folder.resolve()), str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=_environment(), cwd=name)
        except OSError as error:
            raise ConfigError(f"{where} cannot be run ({error.strerror}); name a Python that has the tool.") from None
        if done.returncode or not target.is_file():
            raise CheckpointError(f"{where} does not load {folder}: {_ending(done)}; it is not taken for done.")
        told: dict[str, Any] = json.loads(target.read_text())
    if "missing" in told:
        raise ConfigError(f"{where} lacks a package ({told['missing']}); install it there, or name another Python.")
    if differing := list(_differences(told["weights"], ours, tied)):
        raise RuntimeError(
            f"{told['tool']} in {where} reads {len(differing)} weights of {folder} otherwise, first {differing[0]}; "
            "the folder is not taken for done"
        )
    return str(told["tool"])


def _ending(done: subprocess.CompletedProcess[str]) -> str:
    """Return in one line how a process ended that should not have."""
    if done.returncode == -signal.SIGKILL:
        return "it was killed, most likely as the memory was full"
    if done.returncode < 0:
        return f"it was ended by signal {-done.returncode}"
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    errors = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]
    return " ".join((errors or lines or ["it said nothing"])[-1].split())[:300]


def _differences(
    theirs: dict[str, list[Any]], ours: Iterable[tuple[str, Tensor]], tied: tuple[str, str]
) -> Iterable[str]:
    """Yield every weight that differs, with what differs."""
    embedding, head = tied
    left = dict(theirs)
    found: dict[str, list[Any]] = {}
    for name, tensor in ours:
        want, got = readers.digest(tensor), left.pop(name, None)
        if name == embedding:
            found = {head: want}
        if got is None:
            yield f"{name}, which it has not"
        elif got != want:
            what = [("number format", 0), ("shape", 1)]
            told = [f"{word} {got[i]}, not {want[i]}" for word, i in what if got[i] != want[i]]
            yield f"{name} ({', '.join(told) or 'other values'})"
    for name, got in left.items():
        if found.get(name) != got:
            yield f"{name}, which it has beside them"
