"""Writes golden.json: what NeMo 2 itself writes for the tiny models of `tests/support/nemo.py`, and its default values.

COMPACTLM_NEMO2=... python -m tests.nemo.golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from compactlm_nemo.models.bridge_config import SUPPORTED
from compactlm_nemo.models.nemo import nemo_settings
from compactlm_nemo.models.nemo_config import CONFIGS
from tests.support.nemo import CASES, GOLDEN, make_source, run_nemo, settings_classes, written


def main() -> None:
    golden: dict[str, Any] = {"checkpoints": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {case: make_source(case, folder / case / "hf")[0] for case in CASES}
        jobs = [
            ["import", CASES[case].model, CASES[case].settings, f"{folder}/{case}/hf", f"{folder}/{case}/nemo"]
            for case in CASES
        ]
        run_nemo([*jobs, ["defaults", ",".join(settings_classes()), f"{folder}/defaults.json"]], folder)
        for case, dims in made.items():
            settings = {*nemo_settings(dims, torch.float32), *SUPPORTED}
            golden["checkpoints"][case] = written(folder / case / "nemo", settings)
        defaults = json.loads((folder / "defaults.json").read_text())
    golden["defaults"] = {kind: {k: defaults[kind].get(k) for k in sorted(CONFIGS[kind])} for kind in CONFIGS}
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
