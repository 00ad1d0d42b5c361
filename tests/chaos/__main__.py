"""Everything that goes wrong on a cluster, at random instants, in some hours: `python -m tests.chaos`.

    python -m tests.chaos [--share 1.0] [--seed 0] [--folder DIR] [KIND ...]

Prints a row for each kind of disturbance, and ends with 1 when there was any harm: a run that was lost, a result that
differs from that of an undisturbed run, a damage that was used in silence, a traceback, a process left behind.
With a folder of its own it may be stopped: the next one with the same seed, on the same code, goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

import compactlm_nemo
from compactlm_nemo.artifacts import file_sha256
from tests.chaos import disturbances as d
from tests.chaos.world import Tally, World

HARMS = ("lost", "unequal", "silent", "traceback", "orphan")
DONE = "tallies.jsonl"
"""In the folder: a line for each piece that was tried."""


class Kind(NamedTuple):
    """A kind of disturbance, tried in pieces."""

    count: int
    piece: int
    attempt: Callable[[range], Tally]
    """Makes the disturbances of these numbers."""


def kinds(root: Path, seed: int) -> dict[str, Kind]:
    """Return each kind of disturbance with how many of it are tried."""

    def world(ranks: int) -> World:
        return World(root, ranks)

    def dice(numbers: range) -> random.Random:
        return random.Random(f"{seed} {numbers.start}")

    def same_dice() -> random.Random:
        return random.Random(seed)

    return {
        "kills": Kind(60, 6, lambda n: d.kills(world(1), len(n), dice(n), longest=8)),
        "kills of a rank": Kind(40, 5, lambda n: d.kills(world(2), len(n), dice(n), longest=12)),
        "signals": Kind(24, 6, lambda n: d.signals(world(1), len(n), dice(n), longest=8)),
        "signals to a rank": Kind(16, 4, lambda n: d.signals(world(2), len(n), dice(n), longest=12)),
        "second owners": Kind(3, 1, lambda n: d.second_owners(world(1), len(n))),
        "full disks": Kind(18, 3, lambda n: d.full_disks(world(1), len(n), dice(n))),
        "damaged inputs": Kind(40, 10, lambda n: d.input_damages(world(1), n, same_dice())),
        "damaged artifacts": Kind(60, 10, lambda n: d.artifact_damages(world(1), n, same_dice())),
        "damaged exports": Kind(20, 10, lambda n: d.export_damages(world(1), n, same_dice())),
        "damaged progress": Kind(40, 10, lambda n: d.progress_damages(world(1), n, same_dice())),
        "configs": Kind(300, 100, lambda n: d.configs(len(n), f"{seed}{n.start}")),
    }


def tried(root: Path, name: str, kind: Kind, share: float, seed: int) -> tuple[Tally, float]:
    """Return what the disturbances of a kind did and its seconds; pieces of an earlier command are not tried again."""
    total, done, seconds = Tally(), _done(root), 0.0
    count = max(1, round(kind.count * share))
    for first in range(0, count, kind.piece):
        numbers = range(first, min(first + kind.piece, count))
        key = f"{code()} seed {seed} {name} {numbers.start}-{numbers.stop}"
        if key not in done:
            start = time.monotonic()
            tally = kind.attempt(numbers)
            line = {"key": key, "tried": tally.tried, "harms": tally.harms, "notes": tally.notes}
            done[key] = line | {"seconds": time.monotonic() - start}
            with (root / DONE).open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
        line = done[key]
        total.add(Tally(line["tried"], Counter(line["harms"]), line["notes"]))
        seconds += line["seconds"]
    return total, seconds


def _done(root: Path) -> dict[str, dict]:
    """Return the pieces that were tried in this folder, by their keys."""
    path = root / DONE
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["key"]: line for line in lines}


def code() -> str:
    """Return a word that tells this state of the package from others."""
    files = sorted(Path(compactlm_nemo.__file__).parent.rglob("*.py"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:12]


def main() -> int:
    """Run the kinds that are asked for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", nargs="*", help="only these; all without")
    parser.add_argument("--share", type=float, default=1.0, help="share of the disturbances that are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps what was made, to go on with; a temporary one without")
    args = parser.parse_args()
    console = Console(soft_wrap=True)
    table = Table("disturbance", "tried", *HARMS, "seconds")
    num_harms = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = args.folder or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        every = kinds(root, args.seed)
        for name in args.kind or every:
            if name == "full disks" and not d.can_mount(root / "disk"):
                console.print("full disks: only root can mount them; skipped")
                continue
            tally, seconds = tried(root, name, every[name], args.share, args.seed)
            num_harms += tally.harms.total()
            table.add_row(name, str(tally.tried), *(str(tally.harms[harm]) for harm in HARMS), f"{seconds:.0f}")
            console.print(f"{name}: {tally.tried} tried, {tally.harms.total()} harms", highlight=False)
            for note in tally.notes:
                console.print(f"  {note}", markup=False, highlight=False)
    console.print(table)
    return 1 if num_harms else 0


if __name__ == "__main__":
    sys.exit(main())
