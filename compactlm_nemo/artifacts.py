"""Stage folders: a folder with a manifest is complete, one without is not.

A stage calls `stage_is_done`, then `fresh_folder`, writes its files, and calls `write_manifest` last. All of it is for
one rank only; the others wait at a barrier of the caller.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from compactlm_nemo.errors import CheckpointError, ConfigError, NumericsError

MANIFEST = "manifest.json"


SCHEMA_VERSION = 1


HASHED_BYTES = 64 * 2**20
"""Larger outputs are listed with their size only."""


_MARKER = ".in_progress"


_PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "numpy", "safetensors")


_SHOWN_DIFFERENCES = 5


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file so that readers, and a crash at any moment, see the old or the new content and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically.

    Raises:
        NumericsError: it holds NaN or infinity, which no JSON has.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        where = ", ".join(_nonfinite(value, ""))
        raise NumericsError(f"{path} would hold a number that is not finite ({where}); nothing is written.") from None
    atomic_write_text(path, text + "\n")


def _nonfinite(value: Any, at: str) -> list[str]:
    """Return `KEY=NUMBER` of every number in a JSON value that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{at}={value}"]
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in _nonfinite(inner, f"{at}.{key}".lstrip("."))]


def settings_of(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten dataclasses, dicts and plain values to dotted keys: {"score": cfg.score} -> {"score.samples": 1024, ...}.

    Enums become their names, paths strings and tuples lists, so that the result equals itself read back from JSON.
    """
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        if dataclasses.is_dataclass(value):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": inner for key, inner in settings_of(value).items()})
        else:
            flat[name] = _plain(value)
    return flat


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return SHA-256 over what decides a stage's result: its settings and the fingerprints or hashes of its inputs."""
    text = json.dumps({"settings": dict(settings), "inputs": dict(inputs)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stage_is_done(folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Whether the folder holds this stage's finished result.

    Raises:
        ConfigError: it holds the result of other settings or inputs; the message names what differs.
        CheckpointError: the manifest is damaged.
    """
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_manifest(folder)
    if manifest["fingerprint"] == fingerprint(settings, inputs):
        return True
    differing = [
        *differences(manifest["settings"], settings),
        *differences(manifest["inputs"], inputs, "input "),
    ]
    shown = ", ".join(differing[:_SHOWN_DIFFERENCES])
    more = f" and {len(differing) - _SHOWN_DIFFERENCES} more" if len(differing) > _SHOWN_DIFFERENCES else ""
    raise ConfigError(
        f"run.dir={folder.parent} holds {folder.name} of another configuration (differs: {shown}{more}); "
        f"choose another run.dir or delete {folder}."
    )


def fresh_folder(folder: Path) -> Path:
    """Make an empty stage folder, removing what an interrupted stage left there.

    Only a folder that this function made before is ever removed: it holds a marker until the manifest is written.
    """
    if (folder / MANIFEST).exists():
        raise ConfigError(f"{folder} already holds a finished stage; choose another run.dir or delete it.")
    if (folder / _MARKER).exists():
        for path in folder.iterdir():
            if path.name != _MARKER:  # it goes last: a kill here must leave a folder that is still known as ours
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / _MARKER).unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"{folder} holds files of something else; choose another run.dir or move them away.")
    (folder / _MARKER).touch()
    return folder


def write_manifest(
    folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str], results: Mapping[str, Any]
) -> None:
    """Declare the folder complete: settings, inputs, results, versions, commit, seed and every output file.

    Args:
        settings: Flat, from `settings_of`; `run.seed` among them is repeated as the manifest's seed.
        inputs: Name of an input -> its hash or the fingerprint of the stage that made it.
        results: Whatever the stage wants read later (JSON values).
    """
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "stage": folder.name,
        "fingerprint": fingerprint(settings, inputs),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": settings.get("run.seed"),
        "git_commit": _git_commit(),
        "packages": _package_versions(),
        "settings": dict(settings),
        "inputs": dict(inputs),
        "results": dict(results),
        "outputs": {str(path.relative_to(folder)): _describe(path) for path in _output_files(folder)},
    }
    write_json(folder / MANIFEST, manifest)
    (folder / _MARKER).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished stage; CheckpointError when it is missing or damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}; the stage did not finish, run it first.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete {folder} and run the stage again.") from None
    needed = {"schema_version", "fingerprint", "settings", "inputs", "results", "outputs"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        raise CheckpointError(f"{path} is incomplete; delete {folder} and run the stage again.")
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version={manifest['schema_version']}, this version reads {SCHEMA_VERSION}; "
            f"delete {folder} and run the stage again."
        )
    return manifest


def file_sha256(path: Path) -> str:
    """Return SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], kind: str = "") -> list[str]:
    """Return `KEY=OLD vs NEW` for every key that differs."""
    absent = "(absent)"
    keys = sorted({key for key in old.keys() | new.keys() if old.get(key, absent) != new.get(key, absent)})
    return [f"{kind}{key}={_short(old.get(key, absent))} vs {_short(new.get(key, absent))}" for key in keys]


def _short(value: Any) -> str:
    text = str(value)
    is_digest = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:12] if is_digest else text


def _output_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, _MARKER))


def _describe(path: Path) -> dict[str, Any]:
    num_bytes = path.stat().st_size
    return {"bytes": num_bytes} | ({"sha256": file_sha256(path)} if num_bytes < HASHED_BYTES else {})


def _package_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed package must not report the commit of a repository around it
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


EDGE_BYTES = 2**20
"""Bytes hashed at either end of an input file: enough to tell files apart without reading terabytes at each start."""


def file_identity(path: Path) -> str:
    """Return SHA-256 over a file's size and its first and last MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(0, size - EDGE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()
