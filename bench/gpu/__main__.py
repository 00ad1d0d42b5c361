"""This command checks the package on the GPU of this machine and measures it there, within a number of minutes.

    python -m bench.gpu --minutes 8
    python -m bench.gpu --minutes 4 --parts head,step
    python -m bench.gpu --dry

Parts run one after another, each in a process of its own with a share of the time; one that fails or hangs is recorded
and the others go on. The result is written after every part to bench/results/gpu.json, or to --out; a table is printed
at the end. --dry runs all of it at toy size on the CPU, for a look at whether it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu.environment import versions
from bench.gpu.record import one_line
from bench.gpu.runner import run_part
from bench.gpu.table import markdown
from compactlm_nemo.artifacts import atomic_write_text

RESULTS = Path(__file__).parents[1] / "results" / "gpu.json"
DRY_RESULTS = Path(__file__).parents[1] / ".cache" / "gpu_dry.json"
PARTS = {"environment": 25, "checks": 120, "head": 75, "step": 130, "scoring": 35, "cut": 40, "checkpoint": 35}
"""Part, in their order -> weight of its share of the time; what one leaves over is shared out among the later ones."""
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # imports that ask whether there is a GPU do not start CUDA in the server
}
RESERVE_SECONDS = 5.0
"""For the end: the last part's death and the table."""


class TimeIsUpError(Exception):
    """The whole run has reached its end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole run, which ends by then (default 8)")
    parser.add_argument("--parts", type=parts_of, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--out", type=Path, default=None, help="file of the result")
    args = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.dry:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}  # on a CPU it compiles for minutes
    out = args.out or (DRY_RESULTS if args.dry else RESULTS)
    out.parent.mkdir(parents=True, exist_ok=True)
    sys.exit(run(args.parts, args.minutes * 60, out, dry=args.dry))


def parts_of(text: str) -> list[str]:
    """Return the parts that a comma-separated list names, in their order; the environment is always among them."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no part; give some of {','.join(PARTS)}")
    return [name for name in PARTS if name in ("environment", *names)]


def run(parts: list[str], seconds: float, out: Path, *, dry: bool) -> int:
    """Run the parts until the time is up and print the table; 0 when every part is done and every goal is met."""
    start = time.monotonic()
    result: dict[str, Any] = {
        "run": {"minutes": seconds / 60, "dry": dry, "date": datetime.now(UTC).isoformat(timespec="seconds")},
        "machine": {"versions": versions()},
        "parts": {part: _nothing("left out", "no time left") for part in parts},
    }
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.signal(signal.SIGTERM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for number, part in enumerate(parts):
            left = seconds - RESERVE_SECONDS - (time.monotonic() - start)
            share = PARTS[part] / sum(PARTS[name] for name in parts[number:])
            if left * share < 1:
                continue
            print(f"{part}: up to {left * share:.0f} s", file=sys.stderr, flush=True)
            result["parts"][part] = _isolated(part, left * share, dry=dry)
            if part == "environment":
                result["machine"] |= result["parts"][part]["details"]
            _write(result, out, start)
    except TimeIsUpError:
        print("the time is up", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _write(result, out, start)
    print(markdown(result), flush=True)
    rows = [row for found in result["parts"].values() for row in found["figures"]]
    is_complete = all(found["state"] == "done" for found in result["parts"].values())
    return 0 if is_complete and not any(row["met"] is False for row in rows) else 1


def _isolated(part: str, seconds: float, *, dry: bool) -> dict[str, Any]:
    """Return the result of a part; where even its process could not be started, that error."""
    try:
        return run_part(f"bench.gpu.{part}", seconds, dry=dry)
    except Exception as error:
        if isinstance(error, TimeIsUpError):
            raise
        return _nothing("failed", one_line(error))


def _nothing(state: str, error: str) -> dict[str, Any]:
    """Return the result of a part that has not run."""
    return {"state": state, "seconds": 0.0, "error": error, "figures": [], "details": {}}


def _write(result: dict[str, Any], out: Path, start: float) -> None:
    result["run"]["seconds"] = round(time.monotonic() - start, 1)
    atomic_write_text(out, json.dumps(result, indent=2) + "\n")


def _time_is_up(*_: object) -> None:
    raise TimeIsUpError


if __name__ == "__main__":
    main()
