"""Everything that goes wrong on a cluster, at random instants, in some minutes: `python -m tests.chaos`.

    python -m tests.chaos [--share 1.0] [--seed 0] [--folder DIR] [KIND ...]

Prints a row for each kind of disturbance, and ends with 1 when there was any harm: a run that was lost, a result that
differs from that of an undisturbed run, a damage that was used in silence, a traceback, a process left behind.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos import disturbances as d
from tests.chaos.world import Tally, World

HARMS = ("lost", "unequal", "silent", "traceback", "orphan")


def kinds(root: Path, share: float, seed: int) -> dict[str, Callable[[], Tally]]:
    """Return each kind of disturbance; `share` scales how many of each."""

    def num(count: int) -> int:
        return max(1, round(count * share))

    def world(ranks: int) -> World:
        return World(root, ranks)

    def dice() -> random.Random:
        return random.Random(seed)

    return {
        "kills": lambda: d.kills(world(1), num(60), dice(), longest=8),
        "kills of a rank": lambda: d.kills(world(2), num(40), dice(), longest=12),
        "signals": lambda: d.signals(world(1), num(24), dice(), longest=8),
        "signals to a rank": lambda: d.signals(world(2), num(16), dice(), longest=12),
        "second owners": lambda: d.second_owners(world(1), num(3)),
        "full disks": lambda: d.full_disks(world(1), num(18), dice()),
        "damaged inputs": lambda: d.input_damages(world(1), num(40), dice()),
        "damaged artifacts": lambda: d.artifact_damages(world(1), num(60), dice()),
        "damaged exports": lambda: d.export_damages(world(1), num(20), dice()),
        "damaged progress": lambda: d.progress_damages(world(1), num(40), dice()),
    }


def main() -> int:
    """Run the kinds that are asked for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", nargs="*", help="only these; all without")
    parser.add_argument("--share", type=float, default=1.0, help="share of the disturbances that are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps what was made; a temporary one without")
    args = parser.parse_args()
    console = Console(soft_wrap=True)
    table = Table("disturbance", "tried", *HARMS, "seconds")
    num_harms = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = args.folder or Path(scratch)
        every = kinds(root, args.share, args.seed)
        for name in args.kind or every:
            if name == "full disks" and not d.can_mount(root / "disk"):
                console.print("full disks: only root can mount them; skipped")
                continue
            start = time.monotonic()
            tally = every[name]()
            num_harms += tally.harms.total()
            seconds = f"{time.monotonic() - start:.0f}"
            table.add_row(name, str(tally.tried), *(str(tally.harms[harm]) for harm in HARMS), seconds)
            console.print(f"{name}: {tally.tried} tried, {tally.harms.total()} harms", highlight=False)
            for note in tally.notes:
                console.print(f"  {note}", markup=False, highlight=False)
    console.print(table)
    return 1 if num_harms else 0


if __name__ == "__main__":
    sys.exit(main())
