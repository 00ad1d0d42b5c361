"""Writes golden.json: what Megatron-Bridge itself writes for the tiny models of `tests/support/bridge.py`.

COMPACTLM_BRIDGE=... python -m tests.bridge.golden
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import torch

from compactlm_nemo.models.bridge import model_settings
from compactlm_nemo.models.bridge_config import SUPPORTED
from tests.support.bridge import CASES, GOLDEN, make_source, run_bridge, written


def main() -> None:
    golden = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {case: make_source(case, folder / case / "hf")[0] for case in CASES}
        run_bridge([["import", f"{folder}/{case}/hf", f"{folder}/{case}/bridge"] for case in CASES], folder)
        for case, dims in made.items():
            settings = sorted({*model_settings(dims, torch.float32), *SUPPORTED} - {"_target_"})
            golden[case] = written(folder / case / "bridge" / "iter_0000000", settings)
    text = json.dumps(golden, indent=1, sort_keys=True)
    lists = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
    GOLDEN.write_text(lists.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


if __name__ == "__main__":
    main()
