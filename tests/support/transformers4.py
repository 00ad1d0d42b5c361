"""transformers 4, where `make older` has put it: what others that still have it see of an exported folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    with torch.no_grad():
        torch.save(model.eval()(ids).logits, folder + "/logits4.pt")
    print(folder, model.dtype)
"""
_TOKENIZE = """
import sys
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2])["input_ids"])
"""


def python() -> Path:
    """The Python that has it; skips the test where there is none."""
    path = Path(os.environ.get("COMPACTLM_TRANSFORMERS4", ROOT / ".venv-transformers4" / "bin" / "python"))
    if not path.exists():
        pytest.skip(f"needs transformers 4 in {path}: make older")
    return path


def _run(script: str, *arguments: str) -> str:
    done = subprocess.run([str(python()), "-c", script, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_logits(ids: Path, folders: list[Path]) -> str:
    """Write `logits4.pt` of these token ids into each folder; return a line a folder with its number format."""
    return _run(_LOGITS, str(ids), *map(str, folders))


def tokenize(folder: Path, text: str) -> str:
    """Return the ids of a text, as Python writes them."""
    return _run(_TOKENIZE, str(folder), text).strip()
