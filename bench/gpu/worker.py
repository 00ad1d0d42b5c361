"""One part of `bench.gpu` in a process of its own.

python -m bench.gpu.worker --part bench.gpu.head --seconds 90 --out part.json
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

from bench.gpu.record import Record, one_line


def work(part: str, out: Path, seconds: float, dry: bool) -> int:
    """Run `measure` of the module `part`, or the function of `MODULE:FUNCTION`; an error goes into the record.

    Returns an exit code.
    """
    record = Record(out, seconds, has_goals=not dry)
    try:
        module, _, function = part.partition(":")
        getattr(importlib.import_module(module), function or "measure")(record, dry=dry)
    except BaseException as error:
        traceback.print_exc()
        record.detail("error", one_line(error))
        return 1
    record.detail("is_complete", True)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="until the part is stopped")
    parser.add_argument("--out", type=Path, required=True, help="file of the record")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    args = parser.parse_args()
    sys.exit(work(args.part, args.out, args.seconds, args.dry))


if __name__ == "__main__":
    main()
