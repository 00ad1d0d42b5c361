"""Reads the prose of manuals in reStructuredText from source packages."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

SHORTEST_PROSE = 1000
"""Pages with fewer characters are tables of contents."""


def manual_pages(archive: Path, root: str, suffix: str, left_out: str) -> dict[str, str]:
    """Return the prose of a manual's pages by their names in a source package, without short ones.

    Args:
        root: Folder of the manual.
        suffix: Ending of its pages.
        left_out: Regular expression; pages whose name it finds are not taken.
    Raises:
        ValueError: there are no such pages.
    """
    pages: dict[str, str] = {}
    with tarfile.open(archive) as sdist:
        for member in sdist:
            name = member.name.partition("/")[2]
            is_page = name.startswith(f"{root}/") and name.endswith(suffix) and not re.search(left_out, name)
            if is_page and (file := sdist.extractfile(member)) is not None:
                pages[name] = rest_prose(file.read().decode("utf-8"))
    long_enough = {name: text for name, text in pages.items() if len(text) >= SHORTEST_PROSE}
    if not long_enough:
        raise ValueError(f"no pages below {root}/")
    return long_enough


def rest_prose(source: str) -> str:
    """Extract the prose of a reStructuredText page, roughly: no directives, code, targets, tables or heading rules.

    Paragraphs come out as one line each, separated by an empty line; inline markup leaves its visible text.
    """
    paragraphs: list[str] = []
    skip_deeper_than: int | None = None
    for block in re.split(r"\n\s*\n", source.expandtabs()):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if skip_deeper_than is not None and indent > skip_deeper_than:
            continue
        skip_deeper_than = None
        if lines[0].lstrip().startswith(".."):
            skip_deeper_than = indent
            continue
        prose = [line.strip() for line in lines if not _is_rule(line)]
        text = " ".join(prose)
        if text.endswith("::"):  # a literal block follows
            skip_deeper_than = indent
            text = text[:-1]
        if any(map(str.isalpha, text)) and not re.match(r"[=+-]{3}|:[\w-]+:\s", prose[0]):
            paragraphs.append(_without_markup(text))
    return "\n\n".join(paragraphs)


def _is_rule(line: str) -> bool:
    text = line.strip()
    return len(text) >= 3 and len(set(text)) == 1 and not text[0].isalnum()


def _without_markup(text: str) -> str:
    text = re.sub(r":[\w:+-]+:`~?!?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"``([^`]+)``", r"\1", text)
    text = re.sub(r"`([^`]+)`_?_?", r"\1", text)
    return re.sub(r"(?<!\w)(\*\*?)(\S(?:[^*]*\S)?)\1(?!\w)", r"\2", text)
