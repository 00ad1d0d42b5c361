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
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from compactlm_nemo.errors import CheckpointError, CompactLMError, ConfigError, NumericsError

MANIFEST = "manifest.json"


HASHES = "hashes.json"
"""In each training checkpoint: size and SHA-256 of its files, by name."""


SCHEMA_VERSION = 1
_SEAL = ".sha256"
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
    """Whether the folder holds this stage's finished result, every file there and of its size.

    A file that was changed after the manifest was written is hashed as well.

    Raises:
        ConfigError: it holds the result of other settings or inputs; the message names what differs.
        CheckpointError: the manifest or an output is damaged.
    """
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_manifest(folder)
    if manifest["fingerprint"] == fingerprint(settings, inputs):
        refuse_damage(folder, _changed_problems(folder, manifest["outputs"]))
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


def finished_twin(runs: Path, artifact: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Path | None:
    """Return a finished artifact of these settings and inputs in a folder of runs, which may be a run."""
    for run in (runs, *sorted(runs.glob("*/"))):
        with suppress(CompactLMError):  # another's result, or damaged
            if stage_is_done(run / artifact, settings, inputs):
                return (run / artifact).resolve()
    return None


def refuse_damage(folder: Path, problems: list[str]) -> None:
    """Raise CheckpointError when an artifact has such problems."""
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[0]}{more}; delete {folder} and run again, which makes it anew.")


def file_problems(folder: Path, recorded: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """Return what is wrong with files of a folder, by size and SHA-256; those that are as recorded are not named.

    Args:
        recorded: Name -> `{"bytes": ..., "sha256": ...}`; a name must lead to a file inside the folder.
        names: Those to look at, None for all.
    """
    names = list(recorded if names is None else names)
    problems = {name: _size_problem(folder, name, recorded[name]) for name in names}
    whole = [name for name in names if problems[name] is None and "sha256" in recorded[name]]
    for name, digest in zip(whole, _hashes([folder / name for name in whole]), strict=True):
        if digest != recorded[name]["sha256"]:
            problems[name] = f"{folder / name} is damaged: its SHA-256 is not the recorded one"
    return [problem for problem in problems.values() if problem is not None]


def _size_problem(folder: Path, name: str, recorded: Mapping[str, Any]) -> str | None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{folder / MANIFEST} names {name!r}, which lies outside of its folder"
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path} is missing or cannot be read ({error.strerror})"
    if not path.is_file():
        return f"{path} is no file"
    return None if size == recorded["bytes"] else f"{path} has {size} bytes, not the recorded {recorded['bytes']}"


def _changed_problems(folder: Path, recorded: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with sizes, and with the content of files that are younger than the manifest."""
    problems = [found for name in recorded if (found := _size_problem(folder, name, recorded[name]))]
    written = (folder / MANIFEST).stat().st_mtime
    return problems or file_problems(
        folder, recorded, [name for name in recorded if (folder / name).stat().st_mtime > written]
    )


def describe_files(paths: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """Return size and SHA-256 of files, hashed side by side."""
    paths = list(paths)
    return {
        path: {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _hashes(paths), strict=True)
    }


def _hashes(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing runs beside other threads
        return list(threads.map(file_sha256, paths))


@contextmanager
def sealed(path: Path) -> Iterator[Path]:
    """Replace a file of unfinished work by what the body writes to the path it is given, with its hash beside it.

    The hash, of the new file or the old one, is on disk before the file is: a kill leaves a file that is known whole.
    """
    temporary, seal = path.with_name(f".{path.name}.tmp"), _seal_of(path)
    yield temporary
    old = seal.read_text().split()[:1] if seal.is_file() else []
    atomic_write_text(seal, "\n".join([file_sha256(temporary), *old]) + "\n")
    os.replace(temporary, path)


def remove_sealed(path: Path) -> None:
    """Remove a file of unfinished work and its hash."""
    _seal_of(path).unlink(missing_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damaged_seals(folder: Path) -> dict[Path, str]:
    """Return the sealed files of a folder of unfinished work that are not whole, each with what is wrong."""
    problems = {}
    for seal in folder.glob(f".*{_SEAL}"):
        path = folder / seal.name[1 : -len(_SEAL)]
        if not path.is_file():
            problems[path] = f"{path} is missing"
        elif file_sha256(path) not in seal.read_text(errors="replace").split():
            problems[path] = f"{path} is damaged: its SHA-256 is not the recorded one"
    lost = [path for path in folder.glob("*.safetensors") if not _seal_of(path).is_file()]
    return dict(sorted((problems | {path: f"{path} has lost its SHA-256" for path in lost}).items()))


def _seal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}{_SEAL}")


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
        raise ConfigError(
            f"{folder} holds files and no {MANIFEST} that says of what; choose another run.dir, or move them away."
        )
    (folder / _MARKER).touch()
    return folder


def is_unfinished(folder: Path) -> bool:
    """Whether a stage has begun to write this folder and has not ended."""
    return (folder / _MARKER).exists() and not (folder / MANIFEST).exists()


def write_manifest(
    folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str], results: Mapping[str, Any], **cost: float
) -> None:
    """Declare the folder complete: settings, inputs, results, versions, commit, seed and every output file.

    Args:
        settings: Flat, from `settings_of`; `run.seed` among them is repeated as the manifest's seed.
        inputs: Name of an input -> its hash or the fingerprint of the stage that made it.
        results: Whatever the stage wants read later (JSON values).
        cost: `seconds` of the launch that finished it and its `devices`, which decide nothing.
    """
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "stage": folder.name,
        "fingerprint": fingerprint(settings, inputs),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": settings.get("run.seed"),
        "git_commit": git_commit(),
        "packages": package_versions(),
        "settings": dict(settings),
        "inputs": dict(inputs),
        "results": dict(results),
        "cost": cost,
        "outputs": {
            str(path.relative_to(folder)): described
            for path, described in describe_files(_output_files(folder)).items()
        },
    }
    write_json(folder / MANIFEST, manifest | {"digest": _digest(manifest)})
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
    if isinstance(manifest, dict) and manifest.get("digest", _digest(manifest)) != _digest(manifest):
        raise CheckpointError(f"{path} was changed after it was written; delete {folder} and run the stage again.")
    needed = {"schema_version", "fingerprint", "settings", "inputs", "results", "outputs"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        raise CheckpointError(f"{path} is incomplete; delete {folder} and run the stage again.")
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version={manifest['schema_version']}, this version reads {SCHEMA_VERSION}; "
            f"delete {folder} and run the stage again."
        )
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    """Return SHA-256 over a manifest without its digest."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that decide results, None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_commit() -> str | None:
    """Return the commit of this checkout, None of an installed package."""
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
