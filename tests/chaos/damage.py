"""Ways in which a file is damaged on a disk, on a network, or by somebody's hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], None]


def cut_off(path: Path) -> None:
    """Keep the first half, as a copy that was broken off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    """Leave no byte, as a disk that was full."""
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    """Flip a bit in the middle."""
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    """Let the second half be zeros of the same length, as a block that never reached the disk."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def other_text(path: Path) -> None:
    """Put a page of HTML there, as a download that needed a login."""
    path.write_bytes(b"<!DOCTYPE html><html><body>Sign in</body></html>\n")


def gone(path: Path) -> None:
    """Remove the file."""
    path.unlink()


def folder_instead(path: Path) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


def link_to_nowhere(path: Path) -> None:
    """Put a link in its place that leads nowhere."""
    path.unlink()
    path.symlink_to("nowhere/at/all")


DAMAGES: tuple[Damage, ...] = (
    cut_off, emptied, flipped, zeroed, other_text, gone, folder_instead, link_to_nowhere,
)  # fmt: skip


def files_of(folder: Path) -> list[Path]:
    """Return every file below a folder, links left out, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def copied(folder: Path, target: Path) -> Path:
    """Return a copy of a folder that may be damaged."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, symlinks=True)
    return target
